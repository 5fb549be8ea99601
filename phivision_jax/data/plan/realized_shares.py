"""What a plan drew of what: by source, mode and task, in examples and tokens, beside what was asked."""

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
class Drawn:
    """What one stage took from one group of records."""

    stage: str
    kind: str
    """"source", "mode", "task", or "part": a source's records of one mode, where shares tell modes apart."""
    name: str
    examples: int
    tokens: int
    example_share: float
    token_share: float
    """Of the stage."""
    passes: float | None = None
    """Of a source or part: how often its records that fit were gone through."""
    asked: float | None = None
    """The share that was asked for, where one was."""
    asked_in: str = "examples"
    """What that share counts."""


@dataclasses.dataclass(frozen=True)
class PlanSummary:
    rows: int
    examples: int
    text_padding: float
    """Share of the columns of all rows that hold nothing."""
    patch_padding: float
    rejected: Mapping[str, int]
    """Number of records by source and reason; which ones is in ``Plan.rejected``."""
    resized: int
    drawn: tuple[Drawn, ...]

    def __str__(self) -> str:
        lines = [
            f"{self.rows:,} rows, {self.examples:,} examples ({self.examples / max(self.rows, 1):.2f} per row)",
            f"padding: text {self.text_padding:.2%}, patches {self.patch_padding:.2%}",
        ]
        lines += [f"no row takes: {count:,} records of {which}" for which, count in self.rejected.items()]
        if self.resized:
            lines.append(f"resized to fewer patches: {self.resized:,} records")
        stages = list(dict.fromkeys(d.stage for d in self.drawn))
        for stage in stages:
            lines.append(f"drawn{f' in stage {stage!r}' if len(stages) > 1 else ''}:")
            for d in (d for d in self.drawn if d.stage == stage):
                passes = f"  {d.passes:.2f} passes" if d.passes is not None else ""
                asked = f"  asked {d.asked:.2%} of {d.asked_in}" if d.asked is not None else ""
                lines.append(
                    f"  {d.kind:<6} {d.name:<20} {d.examples:>12,} examples {d.example_share:7.2%}"
                    f" {d.tokens:>16,} tokens {d.token_share:7.2%}{passes}{asked}"
                )
        return "\n".join(lines)


def account(
    stage: Stage,
    names: Sequence[str],
    sources: np.ndarray,
    records: np.ndarray,
    pools: Sequence[Pool],
    datasets: Sequence[Dataset],
    tokens: np.ndarray,
) -> list[Drawn]:
    """What a stage drew, by source, mode and task."""
    modes, tasks = np.empty(len(records), np.int64), np.empty(len(records), np.int64)
    for s, dataset in enumerate(datasets):
        at = sources == s
        modes[at], tasks[at] = dataset.index.modes[records[at]], dataset.index.tasks[records[at]]
    by_mode = stage.reasoning_share is not None
    asked: dict[tuple[str, str], tuple[float, str]] = {}
    if stage.weights:
        total = sum(stage.weights[names[s]] for s in stage.chosen(names))
        asked |= {("source", names[s]): (stage.weights[names[s]] / total, stage.unit) for s in stage.chosen(names)}
    if stage.reasoning_share is not None:
        asked["mode", "think"] = (stage.reasoning_share, stage.reasoning_unit)
    if stage.replay:  # what else was asked is asked of the rest, and this table is about everything
        asked = {("source", name): (share, "examples") for name, share in stage.replay.items()}
    parts = [f"{name}, {mode}" for name in names for mode in MODES]
    sizes = {
        "source": [len(pool.records) for pool in pools],
        "part": [int((pool.modes == m).sum()) for pool in pools for m in range(len(MODES))],
    }
    groups = [("source", sources, names), ("mode", modes, MODES), ("task", tasks, TASKS)]
    drawn = []
    for kind, numbers, labels in [*groups, ("part", sources * len(MODES) + modes, parts)] if by_mode else groups:
        examples = np.bincount(numbers, minlength=len(labels))
        # Weights of bincount are floats: exact below 2⁵³ tokens.
        columns = np.bincount(numbers, weights=tokens, minlength=len(labels)).astype(np.int64)
        for i, label in enumerate(labels):
            share, unit = asked.get((kind, label), (None, "examples"))
            if examples[i] or share:
                size = sizes[kind][i] if kind in sizes else 0
                drawn.append(
                    Drawn(
                        stage=stage.name,
                        kind=kind,
                        name=label,
                        examples=int(examples[i]),
                        tokens=int(columns[i]),
                        example_share=int(examples[i]) / len(records),
                        token_share=int(columns[i]) / int(tokens.sum()),
                        passes=int(examples[i]) / size if size else None,
                        asked=share,
                        asked_in=unit,
                    )
                )
    return drawn
