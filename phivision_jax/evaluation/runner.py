"""Generate the answer to each record's last turn, and score it."""

import logging
from collections.abc import Callable, Iterator

import numpy as np

from phivision_jax.data.records import Record, mode_of
from phivision_jax.data.store.dataset import Dataset, check_processor
from phivision_jax.evaluation.accuracy import Answer
from phivision_jax.evaluation.scoring import exact_match
from phivision_jax.inference.local import LocalGenerator
from phivision_jax.inference.requests import Request
from phivision_jax.io.messages import shorten
from phivision_jax.models.phivision import PhiVision
from phivision_jax.processor import Processor
from phivision_jax.rows import Example
from phivision_jax.text.constants import PromptMode

_log = logging.getLogger(__name__)
MAX_NAMED = 8
"""Records that a warning names."""
MULTIPLE = 128
"""The length of slots is rounded up to a multiple of this."""


class Evaluator:
    """Scores models on a dataset: generates what the assistant answers last in each record, and compares.

    All models have the same configuration, as those of one run have, so that programs are compiled once.

    Records without a question or without an answer at their end are left out, with a warning that names them.

    Args:
      dataset: records whose last message is the assistant's.
      processor: of the model.
      rows: questions that are answered at the same time.
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
        _, tokens = map(dataset.index.sum_images, processor.layout.measure_all(dataset.index.image_sizes))
        longest = int((tokens + dataset.index.text_tokens)[self.records].max())
        self.length = -(-(longest + max_new_tokens) // MULTIPLE) * MULTIPLE
        self._generator: LocalGenerator | None = None

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
        """Answer all questions, in order; ``advance`` receives 1 for each answer."""
        if self._generator is None:
            self._generator = LocalGenerator(model, self.processor, slots=self.rows, length=self.length)
        else:
            self._generator.update(model)
        asked: list[Record] = []
        prompts: list[Example | None] = []

        def requests() -> Iterator[Request]:
            for i in self.records:
                asked.append(self.dataset[int(i)])
                prompts.append(self._prompt(asked[-1]))
                if prompts[-1] is None:
                    advance(1)
                else:
                    yield Request(prompts[-1], mode=self.mode, max_new_tokens=self.max_new_tokens)

        replies = iter(self._generator.generate(requests(), advance))
        return [
            self._score(record, None if prompt is None else next(replies)[0].text)
            for record, prompt in zip(asked, prompts, strict=True)
        ]

    def _prompt(self, record: Record) -> Example | None:
        """The conversation up to the last answer; None for a record that cannot be encoded."""
        try:
            return self.processor.encode(record.messages[:-1], record.images, mode=self.mode, generation_prompt=True)
        except ValueError as error:
            name = f"record {shorten(record.id)!r} of {record.source!r}"
            _log.warning("%s cannot be encoded and counts as wrong: %s", name, error)
            return None

    def _score(self, record: Record, answer: str | None) -> Answer:
        """Compare an answer with the reference; without an answer the record counts as wrong."""
        reference = record.messages[-1]["content"]
        question = record.messages[-2]["content"].replace("<image>", "").strip()
        correct = answer is not None and exact_match(answer, reference)
        return Answer(record.id, record.task, mode_of(record), question, reference, answer or "", correct)


def _is_scorable(record: Record) -> bool:
    roles = [message["role"] for message in record.messages[-2:]]
    contents = [message["content"].rsplit("</think>", 1)[-1].strip() for message in record.messages[-2:]]
    return roles == ["user", "assistant"] and all(contents)
