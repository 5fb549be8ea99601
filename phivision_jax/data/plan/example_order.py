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
_THINK = MODES.index("think")
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
    mode: int | None
    task: int | None
    """None where cells do not distinguish it."""
    records: np.ndarray
    tokens: np.ndarray
    size: float
    """Number of records times ``repeat``."""

    @property
    def mean_tokens(self) -> float:
        return int(self.tokens.sum()) / len(self.tokens)


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
    chosen = stage.chosen(names)
    cells = _cells(pools, names, chosen, stage)
    if not cells:
        raise ValueError(f"stage {stage.name!r} has no records")
    own = max(1, round(math.fsum(cell.size for cell in cells)))
    one_pass = math.ceil(own / stage.own_share - 1e-9)
    total = stage.examples or max(1, round(own * (stage.epochs or 1) / stage.own_share))
    shares = cell_shares(cells, names, stage).tolist()
    modes: dict[int | None, list[int]] = {}
    for c, cell in enumerate(cells):
        if shares[c] > 0:
            modes.setdefault(cell.mode, []).append(c)
    streams = [
        _merge(
            [_cell_stream(cells[c], c, seed, stage.name) for c in of_mode],
            [shares[c] * (cells[c].mean_tokens if stage.unit == "tokens" else 1) for c in of_mode],
            stage.unit,
        )
        for of_mode in modes.values()
    ]
    mode_shares = [
        math.fsum(shares[c] * (cells[c].mean_tokens if stage.reasoning_unit == "tokens" else 1) for c in of_mode)
        for of_mode in modes.values()
    ]
    stream = _merge(streams, mode_shares, stage.reasoning_unit)
    replayed = [
        _cell_stream(_replayed(pools, names, name, stage), len(cells) + k, seed, stage.name)
        for k, name in enumerate(stage.replay)
    ]
    sources, records, _ = _merge([stream, *replayed], [stage.own_share, *stage.replay.values()], "examples")(total)
    return sources, records, one_pass


def _replayed(pools: Sequence[Pool], names: Sequence[str], name: str, stage: Stage) -> _Cell:
    pool = pools[s := names.index(name)]
    if not len(pool.records):
        raise ValueError(f"stage {stage.name!r}: {name!r} has no records to replay that fit a row")
    return _Cell(s, None, None, pool.records, pool.tokens, len(pool.records))


def _cells(pools: Sequence[Pool], names: Sequence[str], chosen: Sequence[int], stage: Stage) -> list[_Cell]:
    by_mode = stage.reasoning_share is not None
    by_task = bool(stage.task_caps) or stage.task_temperature != 1
    cells = []
    for s in chosen:
        pool = pools[s]
        modes = np.where(pool.modes == _THINK, 0, 1) if by_mode else np.zeros(len(pool.records), np.int64)
        tasks = pool.tasks.astype(np.int64) if by_task else np.zeros(len(pool.records), np.int64)
        label = modes * len(TASKS) + tasks
        for value in np.unique(label).tolist():
            inside = np.flatnonzero(label == value)
            cells.append(
                _Cell(
                    source=s,
                    mode=value // len(TASKS) if by_mode else None,
                    task=value % len(TASKS) if by_task else None,
                    records=pool.records[inside],
                    tokens=pool.tokens[inside],
                    size=len(inside) * stage.repeat.get(names[s], 1),
                )
            )
    if by_mode and cells:
        wanted = {"think": stage.reasoning_share != 0, "nothink": stage.reasoning_share != 1}
        for mode, name in ((0, "think"), (1, "nothink")):
            if wanted[name] and not any(cell.mode == mode for cell in cells):
                raise ValueError(
                    f"stage {stage.name!r}: reasoning_share is {stage.reasoning_share:g}, but no record of its sources "
                    f"is of mode {name}; add a source that has them, or leave reasoning_share out"
                )
    if stage.reasoning_share in (0.0, 1.0):
        cells = [cell for cell in cells if cell.mode == (0 if stage.reasoning_share else 1)]
    return cells


def cell_shares(cells: Sequence[_Cell], names: Sequence[str], stage: Stage) -> np.ndarray:
    """[cells] f64: each cell's share of the examples; they add up to 1."""
    shares = np.array([cell.size for cell in cells], np.float64)
    in_tokens = np.array([cell.mean_tokens for cell in cells])
    amounts = in_tokens if stage.unit == "tokens" else np.ones(len(cells))

    # Each constraint: the group of each cell, the share of each group, and the amount that a cell's example counts.
    constraints: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    if stage.weights:
        sources, group = np.unique([cell.source for cell in cells], return_inverse=True)
        constraints.append((group, np.array([stage.weights[names[s]] for s in sources], np.float64), amounts))
        _scale(shares, *constraints[0])
    if cells[0].task is not None:
        tasks, group = np.unique([cell.task for cell in cells], return_inverse=True)
        held = dict(zip(tasks.tolist(), np.bincount(group, shares * amounts).tolist(), strict=True))
        wanted = task_shares(held, stage)
        constraints.append((group, np.array([wanted[task] for task in tasks.tolist()]), amounts))
    if stage.reasoning_share is not None:
        modes, group = np.unique([cell.mode for cell in cells], return_inverse=True)
        wanted = {0: stage.reasoning_share, 1: 1 - stage.reasoning_share}
        units = in_tokens if stage.reasoning_unit == "tokens" else np.ones(len(cells))
        constraints.append((group, np.array([wanted[mode] for mode in modes.tolist()]), units))
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
