"""Sides of the training step's benchmark: run in turns, compared within a turn, and printed as a table."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from phivision_jax.io.progress import bar


@dataclasses.dataclass(frozen=True)
class Side:
    """One line of a table."""

    name: str
    tokens_per_s: float
    """Tokens without padding, at the median over the turns."""
    seconds: list[float]
    """Wall time of each turn over all batches."""
    cpu_seconds: list[float]
    """CPU time of all threads; on busy cores it also counts threads that spin."""
    losses: list[float]
    """Losses of the steps of the first turn."""
    real_share: float
    """Share of the computed positions that are not padding."""


def compare(sides: dict[str, Any], shares: dict[str, float], tokens: int, turns: int, title: str) -> list[Side]:
    """Run every side ``turns`` times, in an order that reverses each time."""
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    with bar(title, (turns + 1) * len(sides)) as advance:
        for turn in range(turns + 1):  # the first warms up and is not timed
            for name in list(sides)[:: -1 if turn % 2 else 1]:
                answers[name].append(sides[name]())
                advance(1)
    compared = []
    for name, (first, *timed) in answers.items():
        seconds, cpu = [a["seconds"] for a in timed], [a["cpu_seconds"] for a in timed]
        compared.append(Side(name, tokens / statistics.median(seconds), seconds, cpu, first["losses"], shares[name]))
    return compared


def cpu_ratio(theirs: Side, ours: Side) -> float:
    """``ratio`` in CPU time, the median over the turns."""
    return statistics.median(b / a for a, b in zip(ours.cpu_seconds, theirs.cpu_seconds, strict=True))


def ratio(theirs: Side, ours: Side) -> tuple[float, float, float]:
    """Ratio of our tokens per second to theirs: median over the turns, lowest and highest."""
    ratios = [b / a for a, b in zip(ours.seconds, theirs.seconds, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def print_table(title: str, sides: Sequence[Side], against: Side) -> None:
    print(f"\n{title}")
    over = f"over {against.name} (range over turns), in CPU time"
    print(f"{'':<34}{'tokens/s':>14}{'s per turn':>12}{'not padding':>14}   {over}")
    for side in sides:
        middle, low, high = ratio(against, side)
        speed = f"{side.tokens_per_s:>14,.0f}{statistics.median(side.seconds):>12.2f}{side.real_share:>14.1%}"
        print(f"{side.name:<34}{speed}   {middle:.2f} ({low:.2f}…{high:.2f}), {cpu_ratio(against, side):.2f}")


def spread(side: Side) -> float:
    """Slowest over fastest turn."""
    return max(side.seconds) / min(side.seconds)


def table(sides: Sequence[Side], against: Side) -> list[dict[str, Any]]:
    """The rows of ``print_table`` as JSON values."""
    rows = []
    for side in sides:
        middle, low, high = ratio(against, side)
        ratios = {"ratio": middle, "ratio_range": [low, high], "cpu_ratio": cpu_ratio(against, side)}
        rows.append({**dataclasses.asdict(side), "over": against.name, **ratios})
    return rows
