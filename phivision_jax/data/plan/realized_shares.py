"""Realized shares of a plan: examples and tokens by source, mode and task, next to the requested shares."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from phivision_jax.data.plan.example_order import Pool
from phivision_jax.data.plan.mixture import Stage
from phivision_jax.data.records import MODES, TASKS
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

    def __str__(self) -> str:
        passes = "" if self.passes is None else f"  {self.passes:.2f} passes"
        requested = "" if self.requested is None else f"  requested {self.requested:.2%} of {self.requested_unit}"
        return (
            f"{self.kind:<6} {self.name:<20} {self.examples:>12,} examples {self.example_share:7.2%}"
            f" {self.tokens:>16,} tokens {self.token_share:7.2%}{passes}{requested}"
        )


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
    # Per kind: the group of each example, the groups' names, and the records available to each.
    kinds: dict[str, tuple[np.ndarray, Sequence[str], list[int]]] = {
        "source": (sources, names, [len(pool.records) for pool in pools]),
        "mode": (modes, MODES, [0] * len(MODES)),
        "task": (tasks, TASKS, [0] * len(TASKS)),
    }
    if stage.splits_modes:
        kinds["part"] = (
            sources * len(MODES) + modes,
            [f"{name}, {mode}" for name in names for mode in MODES],
            [int((pool.modes == m).sum()) for pool in pools for m in range(len(MODES))],
        )
    requested = _requested(stage, names)
    shares = []
    for kind, (groups, labels, available) in kinds.items():
        # Weights of bincount are floats: exact below 2⁵³ tokens.
        examples, amounts = (np.bincount(groups, weights, len(labels)).astype(int) for weights in (None, tokens))
        for label, n, amount, size in zip(labels, examples.tolist(), amounts.tolist(), available, strict=True):
            share, unit = requested.get((kind, label), (None, "examples"))
            if n or share:
                in_stage = n / len(records), amount / int(tokens.sum())
                passes = n / size if size else None
                shares.append(RealizedShare(stage.name, kind, label, n, amount, *in_stage, passes, share, unit))
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
