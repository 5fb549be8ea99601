"""The score of one answer."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Score:
    """The verdict of a rule on one prediction."""

    value: float
    """From 0 (wrong) to 1 (right)."""
    extracted: Any
    """What was understood of the prediction: a letter, a number, a text, a box as a list; None for nothing."""
    reason: str
    """One phrase that explains the value."""
