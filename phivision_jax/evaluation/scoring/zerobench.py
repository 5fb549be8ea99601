"""ZEROBench: the answer in curly braces."""

from collections.abc import Mapping
from typing import Any

from phivision_jax.evaluation.scoring.record import text_of
from phivision_jax.evaluation.scoring.score import UNPARSED, Score, compared
from phivision_jax.evaluation.scoring.thoughts import answer_of


def zerobench_braces(prediction: str, record: Mapping[str, Any]) -> Score:
    """Search the last text in curly braces for the answer, as VLMEvalKit: containment, up to case.

    Args:
      prediction: The reply.
      record: ``answer``: a text.

    Raises:
      KeyError, ValueError: for a record without a usable ``answer``.
    """
    answer = text_of(record, "answer").strip().lower()
    extracted = _last_in_braces(answer_of(prediction).lower())
    if extracted is None:
        return UNPARSED
    return compared(answer in extracted, extracted, "containing the answer")


def _last_in_braces(text: str) -> str | None:
    """The last match of ``{(.*?)}``, for which a search takes quadratic time: braces on one line, from the first."""
    for line in reversed(text.split("\n")):
        for piece in reversed(line.split("}")[:-1]):
            _, brace, inside = piece.partition("{")
            if brace:
                return inside
    return None
