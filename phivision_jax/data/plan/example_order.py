"""The order of a stage's examples, by the shares that its mixture asks for.

Records of one source, mode and task (as far as the settings distinguish them) are a cell. Each cell gets a share of the
examples: its size at first, then scaled until the sources' weights, the tasks' caps or temperature and the reasoning
share hold at once (iterative proportional fitting; Deming and Stephan 1940). Where they cannot all hold, the reasoning
share does, then the tasks'; the plan's summary reports the realized shares.

The k-th record of a cell is due at time (k + ½) / share, or at (tokens before it) / share of tokens; the plan takes
records in the order of these times. So the shares hold in every stretch of the plan. Inside a cell, records follow a
permutation of the epoch: none comes again before all of the cell have come once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from phivision_jax.data.plan.mixture import Stage, Unit
from phivision_jax.data.records import MODES, TASKS
from phivision_jax.data.shuffle import permutation

_FITTING_ROUNDS = 2_000
# Purposes of a seed are numbered over all modules of ``data.plan``.
_CELL_ORDER = 0


@dataclasses.dataclass(frozen=True)
class Pool:
    """The records of one source that examples may come from, as arrays of equal length [n]."""

    records: np.ndarray
    """[n] i64: indices in the source."""
    tokens: np.ndarray
    """[n] i64: tokens of each, image tokens included."""
    modes: np.ndarray
    tasks: np.ndarray
    """[n]: indices into ``MODES`` and ``TASKS``."""


@dataclasses.dataclass(frozen=True)
class _Cell:
    source: int
    mode: int
    task: int
    """0 for all records where cells do not distinguish modes or tasks."""
    records: np.ndarray
    tokens: np.ndarray
    size: float
    """Number of records times ``repeat``."""

    def amount(self, unit: Unit) -> float:
        """The mean amount of an example."""
        return int(self.tokens.sum()) / len(self.tokens) if unit == "tokens" else 1


def order_examples(
    pools: Sequence[Pool], names: Sequence[str], stage: Stage, seed: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """The examples of a stage in order.

    Args:
      pools: one per source.
      names: of the sources.
      seed: of the permutations, which also depend on the stage's name.

    Returns:
      ``(sources, records, length of a pass)``: [N] and [N] i64; a pass is one of ``epochs``, with the examples replayed
      during it.

    Raises:
      ValueError: when no record is available, or a reasoning share is requested of sources without such records.
    """
    cells = _cells(pools, names, stage)
    if not cells:
        raise ValueError(f"stage {stage.name!r} has no records")
    own = max(1, round(math.fsum(cell.size for cell in cells)))
    one_pass = math.ceil(own / stage.own_share - 1e-9)
    total = stage.examples or max(1, round(own * (stage.epochs or 1) / stage.own_share))
    shares = cell_shares(cells, names, stage).tolist()
    streams, mode_shares = [], []
    for mode in dict.fromkeys(cell.mode for cell in cells):
        members = [c for c, cell in enumerate(cells) if cell.mode == mode and shares[c] > 0]
        if members:
            amounts = [shares[c] * cells[c].amount(stage.unit) for c in members]
            streams.append(_merge([_cell_stream(cells[c], c, seed, stage.name) for c in members], amounts, stage.unit))
            mode_shares.append(math.fsum(shares[c] * cells[c].amount(stage.reasoning_unit) for c in members))
    streams = [_merge(streams, mode_shares, stage.reasoning_unit)]
    for k, name in enumerate(stage.replay):
        pool = pools[s := names.index(name)]
        if not len(pool.records):
            raise ValueError(f"stage {stage.name!r}: {name!r} has no records to replay that fit a row")
        cell = _Cell(s, 0, 0, pool.records, pool.tokens, len(pool.records))
        streams.append(_cell_stream(cell, len(cells) + k, seed, stage.name))
    sources, records, _ = _merge(streams, [stage.own_share, *stage.replay.values()], "examples")(total)
    return sources, records, one_pass


def _cells(pools: Sequence[Pool], names: Sequence[str], stage: Stage) -> list[_Cell]:
    cells = []
    for s in stage.chosen(names):
        pool = pools[s]
        label = pool.modes.astype(np.int64) * len(TASKS) * stage.splits_modes + pool.tasks * stage.splits_tasks
        for value in np.unique(label).tolist():
            inside = np.flatnonzero(label == value)
            mode, task = divmod(value, len(TASKS))
            size = len(inside) * stage.repeat.get(names[s], 1)
            cells.append(_Cell(s, mode, task, pool.records[inside], pool.tokens[inside], size))
    if not stage.splits_modes or not cells:
        return cells
    shares = _mode_shares(stage)
    for mode, share in shares.items():
        if share and not any(cell.mode == mode for cell in cells):
            raise ValueError(
                f"stage {stage.name!r}: reasoning_share is {stage.reasoning_share:g}, but no record of its sources "
                f"is of mode {MODES[mode]}; add a source that has them, or leave reasoning_share out"
            )
    return [cell for cell in cells if shares[cell.mode]]


def _mode_shares(stage: Stage) -> dict[int, float]:
    thinking = stage.reasoning_share or 0.0
    return {MODES.index("think"): thinking, MODES.index("nothink"): 1 - thinking}


def cell_shares(cells: Sequence[_Cell], names: Sequence[str], stage: Stage) -> np.ndarray:
    """[cells] f64: each cell's share of the examples; they add up to 1."""
    shares = np.array([cell.size for cell in cells], np.float64)
    amounts = np.array([cell.amount(stage.unit) for cell in cells])
    # Each constraint: the group of each cell, the share of each group, and the amount that a cell's example counts.
    constraints: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def constrain(keys: list[int], wanted: Mapping[int, float], amounts: np.ndarray) -> None:
        groups, group = np.unique(keys, return_inverse=True)
        constraints.append((group, np.array([wanted[key] for key in groups.tolist()], np.float64), amounts))

    if stage.weights:
        weights = {s: stage.weights.get(name, 0.0) for s, name in enumerate(names)}
        constrain([cell.source for cell in cells], weights, amounts)
        _scale(shares, *constraints[0])
    if stage.splits_tasks:
        tasks = [cell.task for cell in cells]
        held = np.bincount(tasks, shares * amounts)
        constrain(tasks, task_shares({task: float(held[task]) for task in sorted(set(tasks))}, stage), amounts)
    if stage.splits_modes:
        units = np.array([cell.amount(stage.reasoning_unit) for cell in cells])
        constrain([cell.mode for cell in cells], _mode_shares(stage), units)
    for _ in range(_FITTING_ROUNDS if len(constraints) > 1 else 1):
        before = shares / shares.sum()
        for constraint in constraints:
            _scale(shares, *constraint)
        if np.abs(shares / shares.sum() - before).max() < 1e-15:
            break  # all hold, or they contradict each other and every round ends where the last did
    # Twelve digits: the last ones of a power or a sum need not be the same on every machine.
    return np.array([float(f"{share:.12g}") for share in (shares / shares.sum()).tolist()])


def _scale(shares: np.ndarray, group: np.ndarray, wanted: np.ndarray, amounts: np.ndarray) -> None:
    """Scale the cells of each group to its wanted share of the total in ``amounts``, in place."""
    held = np.bincount(group, shares * amounts, len(wanted))
    wanted = np.where(held > 0, wanted, 0)
    factors = np.divide(wanted / wanted.sum() * held.sum(), held, out=np.ones(len(held)), where=held > 0)
    shares *= factors[group]


def task_shares(held: Mapping[int, float], stage: Stage) -> dict[int, float]:
    """Shares of tasks by position in ``TASKS`` after temperature, then caps.

    Raises:
      ValueError: when the caps of all tasks present add up to less than 1.
    """
    total = math.fsum(held.values())
    shares = {task: (amount / total) ** stage.task_temperature for task, amount in held.items()}
    total = math.fsum(shares.values())
    shares = {task: share / total for task, share in shares.items()}
    caps = {task: stage.task_caps.get(TASKS[task], 1.0) for task in shares}
    if math.fsum(caps.values()) < 1 - 1e-9:
        raise ValueError(
            f"stage {stage.name!r}: the caps of the tasks present ({', '.join(TASKS[t] for t in shares)}) add up to "
            f"{math.fsum(caps.values()):.2f}, less than 1; leave one of them without a cap"
        )
    capped: set[int] = set()
    while over := {task for task, share in shares.items() if share > caps[task] + 1e-12 and task not in capped}:
        capped |= over
        left = 1 - math.fsum(caps[task] for task in capped)
        free = math.fsum(share for task, share in shares.items() if task not in capped)
        shares = {
            task: caps[task] if task in capped else share * left / free if free else 0.0
            for task, share in shares.items()
        }
    return shares


type _Stream = Callable[[int], tuple[np.ndarray, np.ndarray, np.ndarray]]
"""An endless sequence of examples: the first n as sources, records and tokens, each [n] i64."""


def _cell_stream(cell: _Cell, c: int, seed: int, stage: str) -> _Stream:
    """The records of one cell, a new permutation each epoch."""
    # By name, not by number: a stage that is planned alone has the same examples as among others.
    purpose = int.from_bytes(hashlib.sha256(stage.encode()).digest()[:4])

    def first(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        size = len(cell.records)
        epochs = [permutation(size, seed, _CELL_ORDER, purpose, c, epoch) for epoch in range(-(-n // size))]
        order = np.concatenate(epochs)[:n] if epochs else np.zeros(0, np.int64)
        return np.full(n, cell.source, np.int64), cell.records[order], cell.tokens[order]

    return first


def _merge(streams: Sequence[_Stream], shares: Sequence[float], unit: Unit) -> _Stream:
    """Interleave streams by their shares in ``unit``, in the order of the times at which examples are due."""
    if len(streams) == 1:
        return streams[0]

    def first(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        total = math.fsum(shares)
        counts = [min(n, math.ceil(n * share / total) + 1) for share in shares]
        while True:
            taken = [stream(count) for stream, count in zip(streams, counts, strict=True)]
            due = [_due(tokens, share, unit) for (_, _, tokens), share in zip(taken, shares, strict=True)]
            order = np.argsort(np.concatenate(due), kind="stable")[:n]
            last = np.concatenate(due)[order[-1]] if len(order) == n else math.inf
            # A stream that ends before the last example is due has to be longer.
            short = [k for k, times in enumerate(due) if counts[k] < n and (not len(times) or times[-1] < last)]
            if not short:
                break
            for k in short:
                counts[k] = min(n, counts[k] + counts[k] // 4 + 16)
        sources, records, tokens = (np.concatenate(arrays)[order] for arrays in zip(*taken, strict=True))
        return sources, records, tokens

    return first


def _due(tokens: np.ndarray, share: float, unit: Unit) -> np.ndarray:
    if unit == "examples":
        return (np.arange(len(tokens)) + 0.5) / share
    return (np.cumsum(tokens) - tokens / 2) / share
