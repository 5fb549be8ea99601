"""Results of an evaluation: one row per item and mode, as lines of JSON.

OUT/run.json                   the settings of the run, and a fingerprint of each benchmark's items
OUT/results-PROCESS.jsonl      rows, in the order in which they were finished
OUT/images/SHA256.EXT          images of the items, for reports
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from phivision_jax.text.constants import Mode, PromptMode


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
    """SHA-256 of question, bytes of the images, and settings of sampling: equal for equal requests."""
    question: str
    images: tuple[str, ...]
    """Names of files in OUT/images."""
    record: Mapping[str, Any]
    """What the scoring rule read, as the reference answer."""
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
