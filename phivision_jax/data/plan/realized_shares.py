"""Realized shares of a plan: examples and tokens by source, mode and task, next to the requested shares."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from phivision_jax.data.plan.example_order import Pool
from phivision_jax.data.plan.mixture import Stage
from phivision_jax.data.records import MODES, TASKS

if TYPE_CHECKING:
    from phivision_jax.data.store.dataset import Dataset


@dataclasses.dataclass(frozen=True)
class RealizedShare:
    """Examples and tokens that one stage takes from one group of records."""

    stage: str
    kind: str
    """"source", "mode", "task", or "part": a source's records of one mode, where shares tell modes apart."""
    name: str
    examples: int
    tokens: int
    example_share: float
    """Share of the stage's examples."""
    token_share: float
    """Share of the stage's tokens."""
    passes: float | None = None
    """Passes over the records of a source or part that fit a row."""
    requested: float | None = None
    """The requested share, if any."""
    requested_unit: str = "examples"
    """Unit of the requested share: "examples" or "tokens"."""


@dataclasses.dataclass(frozen=True)
class PlanSummary:
    """Totals of a plan; ``str`` gives the lines that are printed."""

    rows: int
    examples: int
    text_padding: float
    """Share of the positions of all rows that hold no token."""
    patch_padding: float
    rejected: Mapping[str, int]
    """Number of records by source and reason; ``Plan.rejected`` lists them."""
    resized: int
    shares: tuple[RealizedShare, ...]

    def __str__(self) -> str:
        lines = [
            f"{self.rows:,} rows, {self.examples:,} examples ({self.examples / max(self.rows, 1):.2f} per row)",
            f"padding: text {self.text_padding:.2%}, patches {self.patch_padding:.2%}",
        ]
        lines += [f"do not fit a row: {count:,} records of {group}" for group, count in self.rejected.items()]
        if self.resized:
            lines.append(f"resized to fewer patches: {self.resized:,} records")
        stages = list(dict.fromkeys(share.stage for share in self.shares))
        for stage in stages:
            lines.append(f"stage {stage!r}:" if len(stages) > 1 else "shares:")
            for share in (share for share in self.shares if share.stage == stage):
                passes = f"  {share.passes:.2f} passes" if share.passes is not None else ""
                requested = ""
                if share.requested is not None:
                    requested = f"  requested {share.requested:.2%} of {share.requested_unit}"
                lines.append(
                    f"  {share.kind:<6} {share.name:<20} {share.examples:>12,} examples {share.example_share:7.2%}"
                    f" {share.tokens:>16,} tokens {share.token_share:7.2%}{passes}{requested}"
                )
        return "\n".join(lines)


def realized_shares(
    stage: Stage,
    names: Sequence[str],
    sources: np.ndarray,
    records: np.ndarray,
    pools: Sequence[Pool],
    datasets: Sequence[Dataset],
    tokens: np.ndarray,
) -> list[RealizedShare]:
    """The shares of one stage's examples.

    Args:
      names: of the sources.
      sources, records, tokens: [n] of each example: its source, its record, its tokens.
      pools: per source, the records that were available.
      datasets: per source.
    """
    modes, tasks = np.empty(len(records), np.int64), np.empty(len(records), np.int64)
    for s, dataset in enumerate(datasets):
        of_source = sources == s
        modes[of_source] = dataset.index.modes[records[of_source]]
        tasks[of_source] = dataset.index.tasks[records[of_source]]
    kinds: dict[str, tuple[np.ndarray, Sequence[str]]] = {
        "source": (sources, names),
        "mode": (modes, MODES),
        "task": (tasks, TASKS),
    }
    available = {"source": [len(pool.records) for pool in pools]}
    if stage.reasoning_share is not None:
        kinds["part"] = sources * len(MODES) + modes, [f"{name}, {mode}" for name in names for mode in MODES]
        available["part"] = [int((pool.modes == m).sum()) for pool in pools for m in range(len(MODES))]
    requested = _requested(stage, names)
    shares = []
    for kind, (numbers, labels) in kinds.items():
        examples = np.bincount(numbers, minlength=len(labels)).tolist()
        # Weights of bincount are floats: exact below 2⁵³ tokens.
        group_tokens = np.bincount(numbers, weights=tokens, minlength=len(labels)).astype(np.int64).tolist()
        for i, label in enumerate(labels):
            share, unit = requested.get((kind, label), (None, "examples"))
            if not examples[i] and not share:
                continue
            size = available[kind][i] if kind in available else 0
            shares.append(
                RealizedShare(
                    stage=stage.name,
                    kind=kind,
                    name=label,
                    examples=examples[i],
                    tokens=group_tokens[i],
                    example_share=examples[i] / len(records),
                    token_share=group_tokens[i] / int(tokens.sum()),
                    passes=examples[i] / size if size else None,
                    requested=share,
                    requested_unit=unit,
                )
            )
    return shares


def _requested(stage: Stage, names: Sequence[str]) -> dict[tuple[str, str], tuple[float, str]]:
    """(kind, name) → the share that a stage requests, and its unit."""
    if stage.replay:  # the stage's other shares refer to the rest, these to all examples
        return {("source", name): (share, "examples") for name, share in stage.replay.items()}
    requested: dict[tuple[str, str], tuple[float, str]] = {}
    if stage.weights:
        weights = {names[s]: stage.weights[names[s]] for s in stage.chosen(names)}
        requested = {("source", name): (w / sum(weights.values()), stage.unit) for name, w in weights.items()}
    if stage.reasoning_share is not None:
        requested["mode", "think"] = (stage.reasoning_share, stage.reasoning_unit)
    return requested
