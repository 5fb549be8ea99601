"""An imported dataset as a benchmark: the question before the last answer of each record, scored by equality."""

import logging
from collections import defaultdict
from collections.abc import Sequence
from typing import cast

from phivision_jax.data.records import Record, mode_of
from phivision_jax.data.store.dataset import Dataset
from phivision_jax.evaluation.benchmark import Benchmark, Item, Scored
from phivision_jax.evaluation.scoring import Score, exact_match
from phivision_jax.evaluation.task import sample
from phivision_jax.inference.requests import Request
from phivision_jax.io.messages import shorten

_log = logging.getLogger(__name__)
_NAMED = 8
"""Records that a warning names."""


class DatasetBenchmark(Benchmark):
    """Records whose last two messages are a question and its answer, which ``exact_match`` compares.

    Records without a question or without an answer at their end are left out, with a warning that names them.

    Args:
      limit: size of a random sample of the records; 0 for all.
      seed: of the sample.
    """

    name = "dataset"
    title = "Dataset"

    def __init__(self, limit: int = 0, seed: int = 0) -> None:
        self._limit, self._seed = limit, seed

    def items(self, path: str) -> Sequence[Item]:
        dataset = Dataset.open(path)
        chosen = sample(len(dataset), self._limit, self._seed)
        scorable, left_out = dict[str, int](), list[str]()
        for i in chosen:
            record = dataset[i]
            if _is_scorable(record):
                # Records of several sources may have the same id.
                scorable[f"{record.id}#{i}" if record.id in scorable else record.id] = i
            else:
                left_out.append(shorten(record.id))
        if left_out:
            what = f"{len(left_out):,} of {len(chosen):,} records have no question with an answer to score"
            what = f"{dataset.directory}: {what}, for example {', '.join(left_out[:_NAMED])}"
            if not scorable:
                raise ValueError(f"{what}; give data with questions")
            _log.warning("%s; they are left out", what)
        return _Items(dataset, list(scorable.items()))

    def request(self, item: Item) -> Request:
        return Request(item.record["messages"], images=item.images, max_new_tokens=self.max_new_tokens)

    def score(self, prediction: str, item: Item) -> Score:
        correct = exact_match(prediction, item.record["answer"])
        return Score(float(correct), prediction, "equal" if correct else "different")

    def summary(self, scored: Sequence[Scored]) -> dict[str, float]:
        groups: dict[str, list[Scored]] = defaultdict(list)
        for each in scored:
            groups["{mode}/{task}".format(**each.item.groups)].append(each)
        figures = super().summary(scored)
        return figures | {name: super(DatasetBenchmark, self).summary(groups[name])["score"] for name in sorted(groups)}


class _Items(Sequence[Item]):
    """Records as items, read when they are indexed."""

    def __init__(self, dataset: Dataset, numbers: Sequence[tuple[str, int]]) -> None:
        self._dataset, self._numbers = dataset, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, i: int) -> Item:  # type: ignore[override]  # no slices
        id, number = self._numbers[i]
        record = self._dataset[number]
        *messages, answer = record.messages
        question = messages[-1]["content"].replace("<image>", "").strip()
        known = {"messages": messages, "answer": answer["content"]}
        # Images in a dataset are bytes.
        images = cast(tuple[bytes, ...], tuple(record.images))
        return Item(id, question, images, known, {"mode": mode_of(record), "task": record.task})


def _is_scorable(record: Record) -> bool:
    roles = [message["role"] for message in record.messages[-2:]]
    contents = [message["content"].rsplit("</think>", 1)[-1].strip() for message in record.messages[-2:]]
    return roles == ["user", "assistant"] and all(contents)
