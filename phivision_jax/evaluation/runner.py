"""Generate the answer to each record's last turn, in batches of one static shape, and score it."""

import logging
from collections.abc import Callable

import grain
import numpy as np

from phivision_jax.batch import Batch
from phivision_jax.data.records import Record, mode_of
from phivision_jax.data.store.dataset import Dataset, check_processor
from phivision_jax.evaluation.scoring import Answer, exact_match
from phivision_jax.inference.generate import answer_text, generate_ids
from phivision_jax.io.messages import shorten
from phivision_jax.models.phivision import PhiVision
from phivision_jax.processor import Processor
from phivision_jax.rows import Example, expand, fill_rows, row_shape
from phivision_jax.text.constants import PLACEHOLDER, PromptMode

_log = logging.getLogger(__name__)
_BLANK = expand([PLACEHOLDER], [])
"""Fills the rows of the last batch that no question is left for, and those of records that cannot be encoded."""
MAX_NAMED = 8
"""Records that a warning names."""
MULTIPLE = 16
"""T and P are rounded up to a multiple of this."""


class Evaluator:
    """Scores models on a dataset: generates what the assistant answers last in each record, and compares.

    Every batch has the same shapes, the last one too, so all evaluations of a run compile once.

    Records without a question or without an answer at their end are left out, with a warning that names them.

    Args:
      dataset: records whose last message is the assistant's.
      processor: of the model.
      rows: questions per batch.
      max_new_tokens: per answer.
      num_examples: evaluate an evenly spaced sample of this many records; 0 for all.
      mode: of the answers, see ``generate``.

    Raises:
      ValueError: when no record can be scored.
    """

    def __init__(
        self,
        dataset: Dataset,
        processor: Processor,
        *,
        rows: int,
        max_new_tokens: int,
        num_examples: int = 0,
        mode: PromptMode = "auto",
    ) -> None:
        check_processor(dataset, processor)
        self.dataset, self.processor, self.mode = dataset, processor, mode
        self.rows, self.max_new_tokens = rows, max_new_tokens
        count = min(num_examples or len(dataset), len(dataset))
        self.records = self._scorable(np.linspace(0, len(dataset), count, endpoint=False).astype(int))
        # The index counts the answer too, so a prompt is never longer than its record.
        patches, tokens = map(dataset.index.sum_images, processor.layout.measure_all(dataset.index.image_sizes))
        tokens = tokens + dataset.index.text_tokens
        length, num_patches = (-(-int(n[self.records].max()) // MULTIPLE) * MULTIPLE for n in (tokens, patches))
        self.shape = row_shape(processor.config, length, num_patches=num_patches)

    def _scorable(self, chosen: np.ndarray) -> np.ndarray:
        """The records that have a question and an answer."""
        names = ["" if _is_scorable(record := self.dataset[int(i)]) else shorten(record.id) for i in chosen]
        if left_out := list(filter(None, names)):
            what = f"{len(left_out):,} of {len(chosen):,} records have no question with an answer to score, for example"
            what = f"{self.dataset.directory}: {what} {', '.join(left_out[:MAX_NAMED])}"
            if len(left_out) == len(chosen):
                raise ValueError(f"{what}; give data with questions, or no data.eval_path")
            _log.warning("%s; they are left out", what)
        return chosen[[not name for name in names]]

    def __call__(self, model: PhiVision, advance: Callable[[int], None] = lambda _: None) -> list[Answer]:
        """Answer all questions, in order; ``advance`` receives the number of questions of each batch as it finishes."""
        answers: list[Answer] = []
        eos = self.processor.config.decoder.stop_ids
        starts = grain.MapDataset.source(range(0, len(self.records), self.rows))
        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
        for records, examples, batch in starts.map(self._load).to_iter_dataset(options):
            ids = generate_ids(model, batch, max_new_tokens=self.max_new_tokens, eos_id=eos)
            answers += [self._score(*scored) for scored in zip(records, examples, ids, strict=False)]
            advance(len(records))
        return answers

    def _load(self, start: int) -> tuple[list[Record], list[Example], Batch]:
        """Records, their prompts (``_BLANK`` for one that cannot be encoded), and the batch that holds these."""
        records = [self.dataset[int(i)] for i in self.records[start : start + self.rows]]
        examples = [self._prompt(record) for record in records]
        rows = [[example] for example in examples + [_BLANK] * (self.rows - len(examples))]
        return records, examples, fill_rows(rows, self.shape, self.processor.config)

    def _prompt(self, record: Record) -> Example:
        """The conversation up to the last answer; ``_BLANK`` for a record that cannot be encoded."""
        try:
            return self.processor.encode(record.messages[:-1], record.images, mode=self.mode, generation_prompt=True)
        except ValueError as error:
            name = f"record {shorten(record.id)!r} of {record.source!r}"
            _log.warning("%s cannot be encoded and counts as wrong: %s", name, error)
            return _BLANK

    def _score(self, record: Record, example: Example, ids: np.ndarray) -> Answer:
        # The answer to a blank prompt could be right by chance.
        prediction = "" if example is _BLANK else answer_text(self.processor, ids, self.mode)
        reference = record.messages[-1]["content"]
        question = record.messages[-2]["content"].replace("<image>", "").strip()
        correct = example is not _BLANK and exact_match(prediction, reference)
        return Answer(record.id, record.task, mode_of(record), question, reference, prediction, correct)


def _is_scorable(record: Record) -> bool:
    roles = [message["role"] for message in record.messages[-2:]]
    contents = [message["content"].rsplit("</think>", 1)[-1].strip() for message in record.messages[-2:]]
    return roles == ["user", "assistant"] and all(contents)
