"""Answers to a dataset's last turns, generated in batches of one static shape, and scored."""

from __future__ import annotations

import dataclasses
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import grain
import numpy as np
from jax.sharding import Mesh

from phivision_jax.batch import PLACEHOLDER, Batch, Example, expand, fill_rows
from phivision_jax.data.feed.encode import mode_of
from phivision_jax.data.plan.record_sizes import check_processor, lengths_of
from phivision_jax.evaluation.scoring import exact_match
from phivision_jax.inference.generate import answer_text, generate_ids
from phivision_jax.models.phivision import PhiVision
from phivision_jax.sharding import row_sharding

if TYPE_CHECKING:
    from phivision_jax.data.records import Record
    from phivision_jax.data.store.dataset import Dataset
    from phivision_jax.processor import Processor
    from phivision_jax.text.chat import Mode

_log = logging.getLogger(__name__)
_NOTHING = expand([PLACEHOLDER], [])
"""Fills the last batch, and stands for what cannot be asked."""
ROUND = 16
"""T and P are rounded up to a multiple of this."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """One record's question, reference and generated answer."""

    id: str
    task: str
    mode: str
    question: str
    reference: str
    prediction: str
    correct: bool


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """Answers in the dataset's order."""

    answers: tuple[Answer, ...]

    @property
    def accuracy(self) -> float:
        return float(np.mean([answer.correct for answer in self.answers]))

    def by(self, key: Callable[[Answer], str]) -> dict[str, tuple[float, int]]:
        """Accuracy and count per value of ``key``."""
        groups: dict[str, list[bool]] = defaultdict(list)
        for answer in self.answers:
            groups[key(answer)].append(answer.correct)
        return {name: (float(np.mean(correct)), len(correct)) for name, correct in sorted(groups.items())}


class Evaluator:
    """Scores models on a dataset: what each record's assistant says last, asked again.

    Every batch has the same shapes, the last one too, so all evaluations of a run compile once.

    Args:
      dataset: records whose last message is the assistant's.
      processor: of the model.
      rows: questions at a time.
      max_new_tokens: per answer.
      num_examples: an even sample of that many records; None for all.
      mode: of the answers, see ``generate``.
      mesh: to shard the batches over.
    """

    def __init__(
        self,
        dataset: Dataset,
        processor: Processor,
        *,
        rows: int,
        max_new_tokens: int,
        num_examples: int | None = None,
        mode: Mode = "auto",
        mesh: Mesh | None = None,
    ) -> None:
        check_processor(dataset, processor)
        self.dataset, self.processor, self.mode, self.mesh = dataset, processor, mode, mesh
        self.rows, self.max_new_tokens = rows, max_new_tokens
        count = len(dataset) if num_examples is None else min(num_examples, len(dataset))
        self.records = np.linspace(0, len(dataset), count, endpoint=False).astype(int)
        # The index counts the answer too, so a prompt is never longer than its record.
        lengths = lengths_of(dataset.index, processor.config)
        self.length = int(-(-lengths.columns[self.records].max() // ROUND) * ROUND)
        self.num_patches = int(-(-lengths.patches[self.records].max() // ROUND) * ROUND)

    def __call__(self, model: PhiVision, advance: Callable[[int], None] = lambda _: None) -> EvalResult:
        """Ask all questions; ``advance`` is told how many were answered."""
        answers: list[Answer] = []
        for records, asked, batch in self._batches():
            at = row_sharding(self.mesh) if self.mesh else None
            eos = self.processor.tokenizer.eos_id
            ids = generate_ids(model, batch, max_new_tokens=self.max_new_tokens, eos_id=eos, sharding=at)
            answers += [self._judge(*judged) for judged in zip(records, ids, asked, strict=False)]
            advance(len(records))
        return EvalResult(tuple(answers))

    def _batches(self) -> Iterator[tuple[list[Record], list[bool], Batch]]:
        """Records, whether each could be asked, and the batch that asks them."""

        def load(start: int) -> tuple[list[Record], list[bool], Batch]:
            records = [self.dataset[int(i)] for i in self.records[start : start + self.rows]]
            examples = [self._prompt(record) for record in records]
            asked = [example is not _NOTHING for example in examples]
            examples += [_NOTHING] * (self.rows - len(examples))
            return (
                records,
                asked,
                fill_rows(
                    [[example] for example in examples],
                    length=self.length,
                    vision_rows=1,
                    num_patches=self.num_patches,
                    patch_dim=self.processor.config.vision.patch_dim,
                    image_attention=self.processor.config.image_attention,
                    pad_token_id=self.processor.config.decoder.pad_token_id,
                ),
            )

        starts = grain.MapDataset.source(range(0, len(self.records), self.rows))
        return iter(starts.map(load).to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))

    def _prompt(self, record: Record) -> Example:
        """The question; nothing, of a record that cannot be encoded."""
        try:
            return self.processor.encode(record.messages[:-1], record.images, mode=self.mode, generation_prompt=True)
        except ValueError as error:
            _log.warning("record %r of %r cannot be asked and counts as wrong: %s", record.id, record.source, error)
            return _NOTHING

    def _judge(self, record: Record, ids: np.ndarray, asked: bool) -> Answer:
        # What the model says to nothing could be right by chance.
        prediction = answer_text(self.processor, ids, self.mode) if asked else ""
        reference = record.messages[-1]["content"]
        question = record.messages[-2]["content"].replace("<image>", "").strip()
        correct = asked and exact_match(prediction, reference)
        return Answer(record.id, record.task, mode_of(record), question, reference, prediction, correct)
