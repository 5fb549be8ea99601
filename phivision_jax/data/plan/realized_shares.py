"""Realized shares of a plan: examples and tokens by source, mode and task, next to the requested shares."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from phivision_jax.data.plan.example_order import Pool
from phivision_jax.data.plan.mixture import Stage
from phivision_jax.data.records import MODES, TASKS


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


def realized_shares(stage: Stage, names: Sequence[str], pool: Pool, order: np.ndarray) -> list[RealizedShare]:
    """The shares of one stage's examples.

    Args:
      names: of the sources.
      pool: the records that were available.
      order: [n] each example's position in the pool.
    """
    kinds: dict[str, tuple[np.ndarray, Sequence[str]]] = {  # the group of each record, and the groups' names
        "source": (pool.sources, names),
        "mode": (pool.modes, MODES),
        "task": (pool.tasks, TASKS),
    }
    if stage.splits_modes:
        parts = [f"{name}, {mode}" for name in names for mode in MODES]
        kinds["part"] = (pool.sources * len(MODES) + pool.modes, parts)
    requested, tokens = _requested(stage, names), pool.tokens[order]
    shares = []
    for kind, (groups, labels) in kinds.items():
        # Weights of bincount are floats: exact below 2⁵³ tokens.
        examples, amounts = (np.bincount(groups[order], each, len(labels)).astype(int) for each in (None, tokens))
        available = np.bincount(groups, minlength=len(labels)).tolist()
        for label, n, amount, size in zip(labels, examples.tolist(), amounts.tolist(), available, strict=True):
            share, unit = requested.get((kind, label), (None, "examples"))
            if n or share:
                in_stage = n / len(order), amount / int(tokens.sum())
                passes = n / size if size and kind in ("source", "part") else None
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
