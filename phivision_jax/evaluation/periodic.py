"""Benchmarks during training: the same items at every interval, answered by the weights on the training mesh."""

import logging
from collections.abc import Mapping, Sequence

from phivision_jax.evaluation.benchmark import Benchmark, Item
from phivision_jax.evaluation.results import Result
from phivision_jax.evaluation.run import Runner
from phivision_jax.evaluation.slots import LongestRequest, make_generator
from phivision_jax.evaluation.summary import failures, summarize
from phivision_jax.evaluation.task import Sampling, survey
from phivision_jax.inference.local import LocalGenerator
from phivision_jax.models.phivision import PhiVision
from phivision_jax.processor import Processor

_log = logging.getLogger(__name__)
DATASET = "dataset"
"""The name of the benchmark whose score is "eval/accuracy"."""


class Evaluator:
    """Asks models of one configuration the same items, in mode "auto"; programs are compiled once.

    All processes of a job must call it with the same weights: each asks all items.

    Args:
      benchmarks: with the items of each, and the size of a random sample of them, or 0.
      processor: of the model.
      sampling: settings of the requests.
      slots: questions that are answered at the same time.
      shown: items of the first benchmark whose results are kept with their images.

    Raises:
      ValueError: as ``survey``.

    Attributes:
      examples: the last results of the items that are shown.
    """

    def __init__(
        self,
        benchmarks: Sequence[tuple[Benchmark, Sequence[Item], int]],
        processor: Processor,
        *,
        sampling: Sampling,
        slots: int,
        shown: int = 0,
    ) -> None:
        self._processor, self._sampling, self._slots = processor, sampling, slots
        self._longest = LongestRequest(processor)
        self.benchmarks: Mapping[str, Benchmark] = {benchmark.name: benchmark for benchmark, _, _ in benchmarks}
        self.tasks = [
            survey(benchmark, items, sampling, limit=limit, measure=self._longest)
            for benchmark, items, limit in benchmarks
        ]
        first = self.tasks[0]
        self._shown = [(first.name, first.items[i].id) for i in first.chosen[:shown]]
        self.examples: list[tuple[Item, Result]] = []
        self._generator: LocalGenerator | None = None

    def __call__(self, model: PhiVision) -> list[Result]:
        """Answer all items, by a model of the same configuration as before."""
        if self._generator is None:
            self._generator = make_generator(model, self._processor, self._longest.tokens, slots=self._slots)
        else:
            self._generator.update(model)
        results: list[Result] = []
        examples: dict[tuple[str, str], tuple[Item, Result]] = {}

        def receive(result: Result, item: Item) -> None:
            results.append(result)
            if (key := (result.benchmark, result.item)) in self._shown:
                examples[key] = item, result

        Runner(self._generator, receive, sampling=self._sampling, patch=self._processor.patch).run(self.tasks)
        self.examples = [examples[key] for key in self._shown]
        for line in failures(results):
            _log.warning("%s", line)
        return results

    def metrics(self, results: Sequence[Result]) -> dict[str, float]:
        """Figures as "eval/BENCHMARK/FIGURE", and of a dataset "eval/accuracy" (a share) and "eval/examples"."""
        row: dict[str, float] = {}
        for each in summarize(results, self.benchmarks):
            if each.benchmark == DATASET:
                row |= {"eval/accuracy": each.figures["score"] / 100, "eval/examples": each.items}
            else:
                row |= {f"eval/{each.benchmark}/{name}": value for name, value in each.figures.items()}
        return row
