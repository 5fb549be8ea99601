"""Our decisions where they differ from a public scorer: each rule's names of decisions, and the cases they cover."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from phivision_jax.evaluation.scoring import Score

Case = dict[str, Any]
DECISIONS: dict[str, dict[str, Callable[[Case, Score], bool]]] = {
    "screenspot_bbox": {
        "no box is no answer": lambda case, ours: case["public"] == 1 and ours.extracted is None,
        "coordinates are never thousandths": lambda case, ours: ours.extracted is not None and max(ours.extracted) > 1,
    },
    "screenspot_point": {
        "coordinates are never pixels": lambda case, ours: ours.value == 0 and max(ours.extracted or [0]) > 1,
        "a box has a centre": lambda case, ours: len(re.findall(r"\d+(?:\.\d+)?", case["prediction"])) >= 4,
    },
    "screenspot_pixel_click": {
        "no click is no answer": lambda case, ours: case["public"] == 1 and ours.extracted is None,
        "coordinates are always pixels": lambda case, ours: max(ours.extracted or [2]) <= 1,
    },
    "mathvision_equal": {
        "math-verify reads more": lambda case, ours: ours.value == 1,
    },
}
"""Rule → decision → True for a case that it covers, given our score. Rules that are not named agree everywhere."""


def decision(rule: str, case: Case, ours: Score) -> str | None:
    """The decision that explains a difference, None for none."""
    return next((name for name, covers in DECISIONS.get(rule, {}).items() if covers(case, ours)), None)
