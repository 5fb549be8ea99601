"""Add up the accounts of all starts of a run (``goodput.jsonl``; ``goodput.py`` defines the names) and report them.

Two more names appear between starts:

    lost         steps that a later start repeated, because the process died after its last checkpoint
    down         from the last line of a start (one is written with the metrics) to the beginning of the next
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from phivision_jax.io import jsonl, storage
from phivision_jax.io.storage import Location

FILE = "goodput.jsonl"
MEANING = {
    "step": "steps that count",
    "lost": "steps repeated after a kill",
    "down": "between two starts",
    "compile": "compiling",
    "restore": "restoring or initializing the state",
    "data": "devices waiting for data",
    "host": "devices waiting for the host",
    "checkpoint": "waiting for checkpoints",
    "evaluate": "evaluation and validation",
    "other": "start of the program, planning, logging",
}


@dataclasses.dataclass(frozen=True)
class Start:
    """One start of a run, from its lines."""

    began: float
    """Seconds since 1970."""
    ended: float
    """Time of its last line."""
    lines: tuple[tuple[int, dict[str, float]], ...]
    """(step, seconds by name since ``began``) of every line that has a step; the first is where it resumed."""
    seconds: dict[str, float]
    """Seconds by name, from its last line."""

    @property
    def first(self) -> int | None:
        """The step that it resumed from; None when it ended before that was known."""
        return self.lines[0][0] if self.lines else None

    def lost(self, kept: int) -> float:
        """Seconds that the steps after ``kept`` took, interpolated between lines."""
        if not self.lines:
            return 0.0
        steps, spent = zip(*((step, seconds["step"]) for step, seconds in self.lines), strict=True)
        return spent[-1] - float(np.interp(kept, steps, spent))


@dataclasses.dataclass
class Account:
    """Seconds of all starts by name, lost steps subtracted from "step"."""

    seconds: dict[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(MEANING, 0.0))
    stepping: dict[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(MEANING, 0.0))
    """Seconds from each start's first step on, lost steps included in "step", without "down"."""

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def read_starts(run: Location) -> list[Start]:
    """Starts of a run, in order.

    Raises:
      StorageError: when the bucket cannot be read.
    """
    storage.check(run)
    starts = []
    for _, group in itertools.groupby(jsonl.read(run / FILE), key=lambda row: row["start"]):
        rows = list(group)
        lines = tuple((row["step"], row["seconds"]) for row in rows if row["step"] is not None)
        starts.append(Start(rows[-1]["began"], rows[-1]["time"], lines, rows[-1]["seconds"]))
    return starts


def account_of(starts: Sequence[Start], resumed: tuple[int, float] | None = None) -> Account:
    """Add up all starts.

    Args:
      resumed: (step, seconds since 1970) of a start that has just begun: where it resumed, and when it began.
    """
    account = Account()
    begins = [(start.first, start.began) for start in starts] + ([resumed] if resumed else [])
    for i, start in enumerate(starts):
        resumed_at = [first for first, _ in begins[i + 1 :] if first is not None]
        lost = start.lost(min(resumed_at)) if resumed_at else 0.0
        down = max(begins[i + 1][1] - start.ended, 0.0) if i + 1 < len(begins) else 0.0
        for name, seconds in start.seconds.items():
            account.seconds[name] += seconds
            account.stepping[name] += seconds - start.lines[0][1][name] if start.lines else 0.0
        for name, seconds in (("lost", lost), ("step", -lost), ("down", down)):
            account.seconds[name] += seconds
    return account


def report(run: Location) -> str:
    """The time of a run over all its starts, as a table.

    Raises:
      ValueError: when the directory holds no account.
    """
    starts = read_starts(run)
    if not starts:
        raise ValueError(f"{run} holds no {FILE}: it is not a run's directory, or the run has not started")
    account = account_of(starts)
    last = starts[-1].lines
    reached = f"at step {last[-1][0]:,}" if last else "before its first step"
    count = "1 start" if len(starts) == 1 else f"{len(starts)} starts"
    lines = [f"{run}: {count}, {reached}, {duration(account.total)}"]
    total = max(account.total, 1e-9)
    for name, seconds in sorted(account.seconds.items(), key=lambda item: (item[0] != "step", -item[1])):
        if seconds > 0 or name == "step":
            lines.append(f"  {name:<11}{seconds / total:>7.1%}{duration(seconds):>16}   {MEANING[name]}")
    lines.append(f"goodput {account.seconds['step'] / total:.1%}")
    after = {name: seconds for name, seconds in account.stepping.items() if name != "compile"}
    if (stepping := sum(after.values())) > 0:
        rest = sorted(((s / stepping, name) for name, s in after.items() if name != "step"), reverse=True)
        parts = ", ".join(f"{name} {share:.1%}" for share, name in rest if share >= 0.0005)
        lines.append(f"not stepping, once compiled and restored: {sum(share for share, _ in rest):.1%}")
        lines[-1] += f" ({parts})" if parts else ""
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Format seconds: "12.3 s", "4 min 05 s", "3 h 07 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
