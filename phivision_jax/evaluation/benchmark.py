"""The interface of benchmarks: items to ask, a request for each, a rule that scores replies, and a summary."""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from phivision_jax.evaluation.scoring import Score
from phivision_jax.inference.requests import Request


@dataclasses.dataclass(frozen=True)
class Item:
    """A question of a benchmark."""

    id: str
    """Unique in the benchmark, and the same whenever it is read."""
    question: str
    """The text of the user's message. Images replace its ``<image>`` markers; without any they come first."""
    images: tuple[bytes, ...]
    """Encoded image files, in order."""
    record: Mapping[str, Any]
    """Input of the scoring rule: answers, options, boxes."""
    groups: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Groups that are reported apart, as {"split": "human"}."""
    cluster: str = ""
    """Items of one cluster are not independent, such as several questions on one image; "": those of equal images."""


@dataclasses.dataclass(frozen=True)
class Scored:
    """An item that was answered and scored."""

    item: Item
    score: Score


@dataclasses.dataclass(frozen=True)
class Published:
    """A published figure of the model."""

    value: float
    """In the benchmark's unit, mostly per cent."""
    source: str
    """Publication that has it."""
    differs: str = ""
    """Known differences between that measurement and ours."""


class Benchmark(abc.ABC):
    """A benchmark; subclasses are one file each."""

    name: ClassVar[str]
    """As in ``--benchmarks``."""
    title: ClassVar[str]
    """As in reports."""
    download: ClassVar[str] = ""
    """The Hugging Face dataset that ``items`` reads, as "owner/name", or the URL of a git repository; "" for none."""
    published: ClassVar[Published | None] = None
    published_groups: ClassVar[Mapping[str, Published]] = {}
    """Further published figures, by their names in ``summary``."""
    max_new_tokens: ClassVar[int | None] = None
    """Limit of thought and answer; None: 4,096, or what the length of a local model leaves."""
    judged: ClassVar[bool] = False
    """True where the published score depends on a judge, another model; without one ``score`` is the rule's alone."""

    @abc.abstractmethod
    def items(self, path: str) -> Sequence[Item]:
        """The items in a directory or file of the benchmark; reads an item's images when it is indexed.

        Args:
          path: the directory or file; "" to download the data, or where none are needed.

        Raises:
          FileNotFoundError: where there is no data, saying what was expected.
          ValueError: for data of another schema, naming file and column.
        """

    def request(self, item: Item) -> Request:
        """The request for an item; the mode is set by the runner."""
        return Request(item.question, images=item.images, max_new_tokens=self.max_new_tokens)

    @abc.abstractmethod
    def score(self, prediction: str, item: Item) -> Score:
        """The score of a reply's answer, without its thought."""

    def judge_prompt(self, prediction: str, item: Item) -> str | None:
        """The question to a judge about a reply's answer; None where ``score`` decides without one."""
        return None

    def judge_score(self, judge_reply: str, item: Item) -> Score:
        """The score of an answer from the judge's reply to its ``judge_prompt``.

        A reply that does not have the form that the prompt asks for scores 0 with nothing extracted.
        """
        raise NotImplementedError(f"{type(self).__name__} asks no judge")

    def summary(self, scored: Sequence[Scored]) -> dict[str, float]:
        """The figures of a benchmark; "score" is the one that is published, in the same unit."""
        return {"score": 100 * sum(each.score.value for each in scored) / max(len(scored), 1)}
