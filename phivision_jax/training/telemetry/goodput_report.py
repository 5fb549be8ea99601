"""``goodput.jsonl``: the accounts of all starts of a run, added up. ``goodput.py`` says what is counted as what."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from phivision_jax.io import storage
from phivision_jax.io.atomic import with_filename
from phivision_jax.io.storage import Location

FILE = "goodput.jsonl"
MEANING = {
    "step": "steps that count",
    "lost": "steps done again after a kill",
    "down": "between two starts",
    "compile": "compiling",
    "restore": "bringing the state back",
    "data": "devices waiting for data",
    "host": "devices waiting for the host",
    "checkpoint": "standing still for a save",
    "evaluate": "evaluation and validation",
    "other": "start of the program, plan, logging",
}


@dataclasses.dataclass(frozen=True)
class Start:
    """One start of a run, from its lines."""

    began: float
    """Seconds since 1970."""
    ended: float
    """When its last line was written."""
    first: int | None
    """The step it went on from; None: it ended before that was known."""
    after: tuple[tuple[int, dict[str, float]], ...]
    """(step, seconds by what they went to, since ``began``) of every line that has a step."""
    seconds: dict[str, float]
    """As its last line has them."""

    def lost(self, kept: int) -> float:
        """Seconds that the steps after ``kept`` took; between two lines, in proportion."""
        steps = [step for step, _ in self.after]
        if not steps:
            return 0.0
        spent = [seconds["step"] for _, seconds in self.after]
        return spent[-1] - float(np.interp(kept, steps, spent))


@dataclasses.dataclass
class Account:
    """Seconds of all starts."""

    seconds: dict[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(MEANING, 0.0))
    """By what they went to; "step" less "lost"."""
    stepping: dict[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(MEANING, 0.0))
    """The same from where each start began to step, lost steps among "step", nothing "down"."""

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def append_line(run: Path, line: dict[str, Any]) -> None:
    """Append one account; a line that a kill cut off stays a line of its own."""
    with with_filename(run / FILE), (run / FILE).open("a+b") as file:
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(line).encode() + b"\n")


def read_starts(run: Location) -> list[Start]:
    """The starts of a run, in order; lines that a kill cut off are left out."""
    lines = []
    path = run / FILE
    storage.check(path)
    with storage.wrap_storage_errors(path):
        texts = path.read_text().splitlines() if path.exists() else []
    for text in texts:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    starts = []
    for _, group in itertools.groupby(lines, key=lambda line: line["start"]):
        of_start = list(group)
        after = tuple((line["step"], line["seconds"]) for line in of_start if line["step"] is not None)
        last = of_start[-1]
        starts.append(Start(last["began"], last["time"], after[0][0] if after else None, after, last["seconds"]))
    return starts


def account_of(starts: Sequence[Start], resumed: tuple[int, float] | None = None) -> Account:
    """All starts together.

    Args:
      resumed: (step, seconds since 1970) of a start that has only begun: where it went on and when it was made.
    """
    account = Account()
    begins = [(start.first, start.began) for start in starts] + ([resumed] if resumed else [])
    for i, start in enumerate(starts):
        for name, seconds in start.seconds.items():
            account.seconds[name] += seconds
        later = [first for first, _ in begins[i + 1 :] if first is not None]
        lost = start.lost(min(later)) if later else 0.0
        account.seconds["lost"] += lost
        account.seconds["step"] -= lost
        if i + 1 < len(begins):
            account.seconds["down"] += max(begins[i + 1][1] - start.ended, 0.0)
        if start.after:
            for name, seconds in start.seconds.items():
                account.stepping[name] += seconds - start.after[0][1][name]
    return account


def report(run: Location) -> str:
    """What a run's time went to, over all its starts, as a table.

    Raises:
      ValueError: when the directory holds no account.
    """
    starts = read_starts(run)
    if not starts:
        raise ValueError(f"{run} holds no {FILE}: it is not the directory of a training, or of one before its start")
    account = account_of(starts)
    steps = [step for start in starts for step, _ in start.after]
    reached = f"at step {starts[-1].after[-1][0]:,}" if starts[-1].after else "before its first step"
    count = "1 start" if len(starts) == 1 else f"{len(starts)} starts"
    lines = [f"{run}: {count}, {reached if steps else 'no step yet'}, {duration(account.total)}"]
    total = max(account.total, 1e-9)
    for name, seconds in sorted(account.seconds.items(), key=lambda item: (item[0] != "step", -item[1])):
        if seconds > 0 or name == "step":
            lines.append(f"  {name:<11}{seconds / total:>7.1%}{duration(seconds):>16}   {MEANING[name]}")
    lines.append(f"goodput {account.seconds['step'] / total:.1%}")
    after = {name: seconds for name, seconds in account.stepping.items() if name != "compile"}
    if (whole := sum(after.values())) > 0:
        rest = {name: s / whole for name, s in after.items() if name != "step" and s / whole >= 0.0005}
        parts = ", ".join(f"{name} {share:.1%}" for name, share in sorted(rest.items(), key=lambda item: -item[1]))
        not_stepping = 1 - after["step"] / whole
        lines.append(f"not stepping, once compiled and restored: {not_stepping:.1%}" + (f" ({parts})" if parts else ""))
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """``12.3 s``, ``4 min 05 s``, ``3 h 07 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
