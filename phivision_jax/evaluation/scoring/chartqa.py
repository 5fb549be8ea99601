"""Relaxed accuracy of ChartQA."""

from collections.abc import Mapping
from typing import Any

from phivision_jax.evaluation.scoring.record import texts_of
from phivision_jax.evaluation.scoring.score import Score
from phivision_jax.evaluation.scoring.thoughts import answer_of

TOLERANCE = 0.05
"""Largest relative difference of two equal numbers."""


def chartqa_relaxed(prediction: str, record: Mapping[str, Any]) -> Score:
    """Relaxed accuracy of ChartQA, as ``relaxed_correctness`` of lmms-eval and VLMEvalKit.

    Numbers may differ by 5 % of the reference, where "%" at the end divides by 100; a reference of 0 is compared as
    text. Texts are equal up to case. Nothing is removed: not a comma, a currency, a full stop.

    Args:
      prediction: The reply.
      record: ``answer``: the reference, or a list of references of which the best counts.

    Raises:
      KeyError, ValueError: for a record without a usable ``answer``.
    """
    answer = answer_of(prediction)
    number = _number(answer)
    reason = "differs from the reference"
    for reference in texts_of(record, "answer"):
        expected = _number(reference)
        if number is not None and expected:
            if abs(number - expected) / abs(expected) <= TOLERANCE:
                return Score(1.0, answer, "number within 5 %")
            reason = "number differs by more than 5 %"
        elif answer.lower() == reference.lower():
            return Score(1.0, answer, "text equal up to case")
    return Score(0.0, answer, reason)


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
