"""The score of one answer."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Score:
    """The verdict of a rule on one prediction."""

    value: float
    """From 0 (wrong) to 1 (right)."""
    extracted: Any
    """The answer that was understood: a letter, a number, a text, a box as a list; None for nothing."""
    reason: str
    """One phrase that explains the value."""


UNPARSED = Score(0.0, None, "unparsed")
"""The score of a prediction without an answer; no rule guesses."""


def compared(right: bool, extracted: Any, relation: str = "equal to the answer") -> Score:
    """The score of an answer that was understood: 1 if the relation holds, 0 if not."""
    return Score(float(right), extracted, relation if right else f"not {relation}")
