"""Results of an evaluation: one row per item and mode, as lines of JSON.

OUT/run.json              the settings of the run, and a fingerprint of each benchmark's items
OUT/results-SHARD.jsonl   rows, in the order in which they were finished
OUT/images/SHA256.EXT     images of the items, for reports
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from phivision_jax.io import jsonl
from phivision_jax.io.messages import shorten
from phivision_jax.io.read_json import read_json
from phivision_jax.io.storage import Location, children
from phivision_jax.text.constants import Mode, PromptMode

RUN, IMAGES = "run.json", "images"
"""Names in the directory of an evaluation."""


@dataclasses.dataclass(frozen=True)
class Result:
    """The reply to one item of a benchmark in one mode, and its score."""

    benchmark: str
    item: str
    """The item's id."""
    mode: PromptMode
    """The mode that was asked for."""
    taken: Mode | None
    """The mode that the reply shows."""
    fingerprint: str
    """SHA-256 of question, bytes of the images, and settings of sampling; the same in all modes."""
    question: str
    images: tuple[str, ...]
    """Names of files in OUT/images."""
    record: Mapping[str, Any]
    """Input of the scoring rule, such as the reference answer."""
    groups: Mapping[str, str]
    cluster: str
    """Items of one cluster are not independent."""
    thought: str
    answer: str
    finish_reason: str
    """As ``Reply.finish_reason``; "error" for a request that failed, which scores 0."""
    error: str
    """The sentence of that failure; "" for none."""
    value: float
    """``Score.value``."""
    extracted: Any
    reason: str
    judge: str
    """The judge that the score depends on; "" for a rule alone."""
    prompt_tokens: int
    image_tokens: int
    thought_tokens: int
    answer_tokens: int
    queue: float
    """Seconds before the prefill."""
    prefill: float
    """Seconds from there to the first token."""
    decode: float
    """Seconds from the first token to the last."""
    cached: bool = False
    """True if the reply was taken from the cache of replies, so that its times are those of an earlier request."""

    @property
    def output_tokens(self) -> int:
        """Generated tokens, of thought and answer."""
        return self.thought_tokens + self.answer_tokens

    @property
    def seconds(self) -> float:
        """From the beginning of the prefill to the last token."""
        return self.prefill + self.decode

    @property
    def key(self) -> tuple[str, str, str]:
        """Benchmark, item and mode: unique in a run."""
        return self.benchmark, self.item, self.mode

    @property
    def failed(self) -> bool:
        """True if there was no reply."""
        return self.finish_reason == "error"


_FIELDS = {field.name for field in dataclasses.fields(Result)}


def results_file(directory: Location, shard: int) -> Location:
    """The file of one shard's rows."""
    return directory / f"results-{shard}.jsonl"


def read_results(path: Location) -> list[Result]:
    """The rows of one file, each item and mode once; a last row that is cut short is left out.

    Raises:
      ValueError: for a row that has other fields, naming the file.
    """
    found: dict[tuple[str, str, str], Result] = {}
    for row in jsonl.read(path):
        if row.keys() != _FIELDS:
            unknown = ", ".join(sorted(row.keys() ^ _FIELDS))
            raise ValueError(f"{path} was written by another version: its rows differ in {shorten(unknown)}")
        result = Result(**row | {"images": tuple(row["images"])})
        found.setdefault(result.key, result)
    return list(found.values())


def load_results(directory: Location) -> tuple[dict[str, Any], list[Result]]:
    """The settings of an evaluation (run.json), and the rows of all its shards.

    Raises:
      ValueError: when there is no evaluation, or it was written by another version.
    """
    settings = read_json(directory / RUN)
    found = [re.fullmatch(r"results-(\d+)\.jsonl", child.name) for child in children(directory)]
    shards = sorted(int(match[1]) for match in found if match)
    return settings, [result for shard in shards for result in read_results(results_file(directory, shard))]
