"""The order of a stage's examples, by the shares that its mixture asks for, and the shares that result.

Records of one source, mode and task (as far as the settings distinguish them) are a cell. Each cell gets a share of the
examples: its size at first, then scaled until the sources' weights, the tasks' caps or temperature and the reasoning
share hold at once (iterative proportional fitting; Deming and Stephan 1940). Where they cannot all hold, the reasoning
share does, then the tasks'; the plan's summary reports the realized shares.

A record of a cell is due at time (amount before it + ½ its own) / share, in examples or tokens; the plan takes records
in the order of these times. So the shares hold in every stretch of the plan. Inside a cell, records follow a
permutation of the epoch: none comes again before all of the cell have come once.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from phivision_jax.data.plan.mixture import Stage, Unit
from phivision_jax.data.records import MODES, TASKS
from phivision_jax.data.shuffle import permutation
from phivision_jax.io.messages import did_you_mean

_FITTING_ROUNDS = 2_000
# Purposes of a seed are numbered over all modules of ``data.plan``.
_CELL_ORDER = 0


class Pool(NamedTuple):
    """The records that examples may come from, as arrays [n] of i64."""

    sources: np.ndarray
    """Index of each record's source."""
    tokens: np.ndarray
    """Tokens of each, image tokens included."""
    modes: np.ndarray
    tasks: np.ndarray
    """Indices into ``MODES`` and ``task_names``."""
    task_names: tuple[str, ...] = TASKS

    def amounts(self, unit: Unit) -> np.ndarray:
        """[n] i64: each record in a unit of shares, its tokens or 1."""
        return self.tokens if unit == "tokens" else np.ones_like(self.tokens)


class _Cell(NamedTuple):
    source: int
    mode: int
    task: int
    """0 for all records where cells do not distinguish modes or tasks."""
    members: np.ndarray
    """Positions in the pool."""
    size: float
    """Number of records times ``repeat``."""


def order_examples(pool: Pool, names: Sequence[str], stage: Stage, seed: int) -> tuple[np.ndarray, int]:
    """The examples of a stage in order.

    Args:
      names: of the sources.
      seed: of the permutations, which also depend on the stage's name.

    Returns:
      ``(order, length of a pass)``: [N] i64 positions in the pool; a pass is one of ``epochs``, with the examples
      replayed during it.

    Raises:
      ValueError: when no record is available, or a reasoning share is requested of sources without such records.
    """
    cells = _cells(pool, names, stage)
    if not cells:
        raise ValueError(f"stage {stage.name!r} has no records")
    own = max(1, round(math.fsum(cell.size for cell in cells)))
    one_pass = math.ceil(own / stage.own_share - 1e-9)
    total = stage.examples or max(1, round(own * (stage.epochs or 1) / stage.own_share))
    by_record = pool.amounts(stage.unit), pool.amounts(stage.reasoning_unit)
    # The mean of each cell's records.
    means = [[int(each[cell.members].sum()) / len(cell.members) for cell in cells] for each in by_record]
    amounts, reasoning_amounts = map(np.array, means)
    shares = _cell_shares(cells, names, stage, amounts, reasoning_amounts, pool.task_names)
    streams, mode_shares = [], []
    for mode in dict.fromkeys(cell.mode for cell in cells):
        chosen = [c for c, cell in enumerate(cells) if cell.mode == mode and shares[c] > 0]
        if chosen:
            of_mode = [_cell_stream(cells[c].members, c, seed, stage.name) for c in chosen]
            streams.append(_merge(of_mode, (shares * amounts)[chosen].tolist(), by_record[0]))
            mode_shares.append(math.fsum((shares * reasoning_amounts)[chosen].tolist()))
    streams = [_merge(streams, mode_shares, by_record[1])]
    for k, name in enumerate(stage.replay):
        members = np.flatnonzero(pool.sources == names.index(name))
        if not len(members):
            raise ValueError(f"stage {stage.name!r}: {name!r} has no records to replay that fit a row")
        streams.append(_cell_stream(members, len(cells) + k, seed, stage.name))
    return _merge(streams, [stage.own_share, *stage.replay.values()], pool.amounts("examples"))(total), one_pass


def _cells(pool: Pool, names: Sequence[str], stage: Stage) -> list[_Cell]:
    cells = []
    for task in stage.task_caps:
        if task not in pool.task_names:
            known = did_you_mean(task, pool.task_names)
            raise ValueError(f"stage {stage.name!r}: no record has the task {task!r} of task_caps; {known}")
    labels = pool.modes * len(pool.task_names) * stage.splits_modes + pool.tasks * stage.splits_tasks
    for s in stage.chosen(names):
        of_source = np.flatnonzero(pool.sources == s)
        for label in np.unique(labels[of_source]).tolist():
            members = of_source[labels[of_source] == label]
            mode, task = divmod(label, len(pool.task_names))
            cells.append(_Cell(s, mode, task, members, len(members) * stage.repeat.get(names[s], 1)))
    if not stage.splits_modes or not cells:
        return cells
    shares = _mode_shares(stage)
    for mode, share in shares.items():
        if share and not any(cell.mode == mode for cell in cells):
            given, remedy = f"reasoning_share is {stage.reasoning_share:g}", "or leave reasoning_share out"
            problem = f"{given}, but no record of its sources is of mode {MODES[mode]}"
            raise ValueError(f"stage {stage.name!r}: {problem}; add a source that has them, {remedy}")
    return [cell for cell in cells if shares[cell.mode]]


def _mode_shares(stage: Stage) -> dict[int, float]:
    thinking = stage.reasoning_share or 0.0
    return {MODES.index("think"): thinking, MODES.index("nothink"): 1 - thinking}


def _cell_shares(
    cells: Sequence[_Cell],
    names: Sequence[str],
    stage: Stage,
    amounts: np.ndarray,
    reasoning_amounts: np.ndarray,
    task_names: Sequence[str],
) -> np.ndarray:
    """[cells] f64: each cell's share of the examples; they add up to 1.

    Args:
      amounts, reasoning_amounts: [cells] the mean of a cell's records in ``unit`` and ``reasoning_unit``.
    """
    shares = np.array([cell.size for cell in cells], np.float64)
    # Each constraint: the group of each cell, the share of each group, and the amount that a cell's example counts.
    constraints: list[tuple[list[int], Mapping[int, float], np.ndarray]] = []
    if stage.weights:
        weights = {s: stage.weights.get(name, 0.0) for s, name in enumerate(names)}
        constraints.append(([cell.source for cell in cells], weights, amounts))
        _scale(shares, *constraints[0])
    if stage.splits_tasks:
        tasks = [cell.task for cell in cells]
        held = np.bincount(tasks, shares * amounts)
        present = {task: float(held[task]) for task in sorted(set(tasks))}
        constraints.append((tasks, task_shares(present, stage, task_names), amounts))
    if stage.splits_modes:
        constraints.append(([cell.mode for cell in cells], _mode_shares(stage), reasoning_amounts))
    for _ in range(_FITTING_ROUNDS if len(constraints) > 1 else 1):
        before = shares / shares.sum()
        for constraint in constraints:
            _scale(shares, *constraint)
        if np.abs(shares / shares.sum() - before).max() < 1e-15:
            break  # all hold, or they contradict each other and every round ends where the last did
    # Twelve digits: the last ones of a power or a sum need not be the same on every machine.
    return np.array([float(f"{share:.12g}") for share in (shares / shares.sum()).tolist()])


def _scale(shares: np.ndarray, group: list[int], shares_of: Mapping[int, float], amounts: np.ndarray) -> None:
    """Scale the cells of each group to its share of the total in ``amounts``, in place."""
    held = np.bincount(group, shares * amounts)
    wanted = np.array([shares_of.get(key, 0.0) if held[key] > 0 else 0.0 for key in range(len(held))])
    factors = np.divide(wanted / wanted.sum() * held.sum(), held, out=np.ones(len(held)), where=held > 0)
    shares *= factors[group]


def task_shares(held: Mapping[int, float], stage: Stage, task_names: Sequence[str] = TASKS) -> dict[int, float]:
    """Shares of tasks by position in ``task_names`` after temperature, then caps.

    Raises:
      ValueError: when the caps of all tasks present add up to less than 1.
    """
    total = math.fsum(held.values())
    shares = {task: (amount / total) ** stage.task_temperature for task, amount in held.items()}
    total = math.fsum(shares.values())
    shares = {task: share / total for task, share in shares.items()}
    caps = {task: stage.task_caps.get(task_names[task], 1.0) for task in shares}
    if (most := math.fsum(caps.values())) < 1 - 1e-9:
        present = f"the caps of the tasks present ({', '.join(task_names[task] for task in shares)})"
        remedy = "leave one of them without a cap"
        raise ValueError(f"stage {stage.name!r}: {present} add up to {most:.2f}, less than 1; {remedy}")
    capped: set[int] = set()
    while over := {task for task, share in shares.items() if share > caps[task] + 1e-12 and task not in capped}:
        capped |= over
        left = 1 - math.fsum(caps[task] for task in capped)
        free = math.fsum(share for task, share in shares.items() if task not in capped) or 1.0
        shares = {task: caps[task] if task in capped else share * left / free for task, share in shares.items()}
    return shares


type _Stream = Callable[[int], np.ndarray]
"""An endless sequence of examples: the first n as positions in the pool, [n] i64."""


def _cell_stream(members: np.ndarray, c: int, seed: int, stage: str) -> _Stream:
    """The records of one cell, a new permutation each epoch."""
    # By name, not by number: a stage that is planned alone has the same examples as among others.
    purpose = int.from_bytes(hashlib.sha256(stage.encode()).digest()[:4])

    def first(n: int) -> np.ndarray:
        size = len(members)
        epochs = [permutation(size, seed, _CELL_ORDER, purpose, c, epoch) for epoch in range(-(-n // size))]
        return members[np.concatenate([*epochs, np.zeros(0, np.int64)])[:n]]

    return first


def _merge(streams: Sequence[_Stream], shares: Sequence[float], amounts: np.ndarray) -> _Stream:
    """Interleave streams by their shares of ``amounts`` [pool], in the order of the times at which examples are due."""
    if len(streams) == 1:
        return streams[0]

    def first(n: int) -> np.ndarray:
        total = math.fsum(shares)
        counts = [min(n, math.ceil(n * share / total) + 1) for share in shares]
        while True:
            taken = [stream(count) for stream, count in zip(streams, counts, strict=True)]
            sizes = [amounts[examples] for examples in taken]
            due = [(np.cumsum(size) - size / 2) / share for size, share in zip(sizes, shares, strict=True)]
            order = np.argsort(np.concatenate(due), kind="stable")[:n]
            last = np.concatenate(due)[order[-1]] if len(order) == n else math.inf
            # A stream that ends before the last example is due has to be longer.
            short = [k for k, times in enumerate(due) if counts[k] < n and (not len(times) or times[-1] < last)]
            if not short:
                return np.concatenate(taken)[order]
            for k in short:
                counts[k] = min(n, counts[k] + counts[k] // 4 + 16)

    return first


# ---------------------------------------------------------------------------------------------------------------------
# The shares that result.


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
        examples = f"{self.kind:<6} {self.name:<20} {self.examples:>12,} examples {self.example_share:7.2%}"
        return f"{examples} {self.tokens:>16,} tokens {self.token_share:7.2%}{passes}{requested}"


def realized_shares(stage: Stage, names: Sequence[str], pool: Pool, order: np.ndarray) -> list[RealizedShare]:
    """The shares of one stage's examples.

    Args:
      names: of the sources.
      pool: the records that were available.
      order: [n] each example's position in the pool.
    """
    # The kind of groups, the group of each record, and the groups' names.
    kinds = [("source", pool.sources, names), ("mode", pool.modes, MODES), ("task", pool.tasks, pool.task_names)]
    if stage.splits_modes:
        parts = [f"{name}, {mode}" for name in names for mode in MODES]
        kinds.append(("part", pool.sources * len(MODES) + pool.modes, parts))
    requested, tokens = _requested(stage, names), pool.tokens[order]
    shares = []
    for kind, groups, labels in kinds:
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
