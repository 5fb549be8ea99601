"""A run under the launcher that is killed and stopped again and again, to be compared with an undisturbed one."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from phivision_jax.checkpoint.layout import CHECKPOINTS, read_meta
from phivision_jax.io.progress import bar
from phivision_jax.training.telemetry.metrics import FILE, read_metrics
from tests.support.launched import under_launcher
from tests.support.paths import ROOT

STARTING_SHARE = 0.2
"""Share of the disturbances that come while processes are starting."""
PATIENCE_S = 600.0
"""Seconds without a start, an end or a step after which the run hangs."""
_POLL_S = 0.05
_STARTED = "launch: started process"
_PID = re.compile(r"\(pid (\d+)\)")


@dataclasses.dataclass(frozen=True)
class Disturbance:
    """One signal to one process."""

    signal: int
    process: int
    starting: bool
    """True if it comes before the first step of a start."""
    when: float
    """In [0, 1): fraction of the time that starting takes, or of the steps available for it."""
    delay_s: float


@dataclasses.dataclass
class Outcome:
    """The result of a run under disturbances."""

    code: int | None = None
    wall_s: float = 0.0
    starts: int = 0
    sent: dict[str, int] = dataclasses.field(default_factory=lambda: {"SIGKILL": 0, "SIGTERM": 0})
    steps_lost: int = 0
    """Steps that a later start repeated."""
    starting_s: float = 0.0
    """Seconds from a start to its first step: with compilation if undisturbed, else of the latest start."""


def sample_disturbances(kills: int, terms: int, processes: int, seed: int) -> list[Disturbance]:
    """Disturbances in order, sampled from a seed."""
    rng = random.Random(seed)
    numbers = [signal.SIGKILL] * kills + [signal.SIGTERM] * terms
    rng.shuffle(numbers)
    return [
        Disturbance(
            number, rng.randrange(processes), rng.random() < STARTING_SHARE, rng.random(), 0.3 * rng.random() ** 2
        )
        for number in numbers
    ]


class DisturbedRun:
    """A run under the launcher, observed through its files.

    Args:
      command: command line of each process, which writes to ``run``.
      steps: number of steps.
      every: steps between checkpoints.
      log: file for what launcher and processes print.
    """

    def __init__(self, command: Sequence[str], run: Path, processes: int, steps: int, every: int, log: Path) -> None:
        self.run, self.steps, self.every, self.log = run, steps, every, log
        with log.open("wb") as file:
            self.launcher = subprocess.Popen(
                under_launcher(list(command), processes, restarts=9999), cwd=ROOT, stdout=file, stderr=file
            )
        self.outcome = Outcome()
        self._began = time.monotonic()

    def undisturbed(self) -> Outcome:
        """Wait for its end."""
        self._until(lambda: self.newest() > 0, "the first step")
        self.outcome.starting_s = time.monotonic() - self._began
        return self._end()

    def disturbed(self, disturbances: Sequence[Disturbance], starting_s: float) -> Outcome:
        """Carry out all disturbances, then wait for the end. If it ends earlier, ``sent`` shows that.

        Args:
          starting_s: seconds that starting takes, until a start has been measured.
        """
        self.outcome.starting_s = starting_s
        with bar("disturbances", len(disturbances), shown=sys.stdout.isatty()) as advance:
            for i, disturbance in enumerate(disturbances):
                self._until(lambda i=i: len(self.starts()) > i, f"start {i + 1}")  # type: ignore[misc]
                self._await(disturbance, len(disturbances) - i)
                if self.launcher.poll() is not None:
                    break
                newest = self.newest()
                with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
                    os.kill(self.starts()[i][disturbance.process], disturbance.signal)
                    self.outcome.sent[signal.Signals(disturbance.signal).name] += 1
                self._until(lambda i=i: len(self.starts()) > i + 1, f"start {i + 2}")  # type: ignore[misc]
                self.outcome.steps_lost += max(newest - self.saved(), 0)
                advance(1)
        return self._end()

    def _await(self, disturbance: Disturbance, left: int) -> None:
        """Wait until a disturbance is due: a fraction of the start-up time; or of the steps that are available for each
        one that is left plus those that a kill loses on average, at most twice that many."""
        first, before, began = self.saved(), self._file(), time.monotonic()
        due = began + disturbance.when * self.outcome.starting_s if disturbance.starting else math.inf
        # The metrics of an earlier start are replaced when training begins.
        self._until(lambda: self._file() != before or time.monotonic() >= due, "training")
        if self._file() != before:
            self.outcome.starting_s = time.monotonic() - began
        if disturbance.starting:
            return
        most = 2 * ((self.steps - first) / (left + 1) + self.every / 2)
        # After SIGTERM it takes a second or two until all agree; that must not reach the end of training.
        aim = min(first + 1 + int(disturbance.when * most), self.steps - 2 * self.every)
        self._until(lambda: self.newest() >= aim, f"step {aim}")
        until = time.monotonic() + disturbance.delay_s
        self._until(lambda: time.monotonic() >= until, "some time")

    def _until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for a condition, or for the launcher's end."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition() and self.launcher.poll() is None:
            if time.monotonic() > deadline:
                self.launcher.terminate()
                raise TimeoutError(f"{what} has not come in {PATIENCE_S:.0f} s; see {self.log}")
            time.sleep(_POLL_S)

    def _end(self) -> Outcome:
        self.outcome.code, self.outcome.wall_s = self.launcher.wait(), time.monotonic() - self._began
        self.outcome.starts = len(self.starts())
        return self.outcome

    def starts(self) -> list[list[int]]:
        """Process ids of each start so far."""
        lines = (line for line in self.log.read_text(errors="replace").splitlines() if line.startswith(_STARTED))
        return [[int(pid) for pid in _PID.findall(line)] for line in lines]

    def newest(self) -> int:
        """The last step in the metrics."""
        if not (path := self.run / FILE).exists():
            return 0
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - 100_000, 0))
            lines = file.read().split(b"\n")
        steps = [int(line.split(b":", 1)[1].split(b",", 1)[0]) for line in lines[:-1] if line.startswith(b'{"step": ')]
        return steps[-1] if steps else 0

    def saved(self) -> int:
        """The newest checkpoint's step."""
        folder = self.run / CHECKPOINTS
        return max((int(path.name) for path in folder.glob("*") if path.name.isdecimal()), default=0)

    def _file(self) -> int | None:
        path = self.run / FILE
        return path.stat().st_ino if path.exists() else None


def differences(left: Path, right: Path, processes: int) -> dict[str, str]:
    """First difference of two runs in each of losses, records and final state; empty if there is none."""
    found = {}
    losses = [[(row["step"], row["loss"]) for row in read_metrics(run) if "loss" in row] for run in (left, right)]
    if losses[0] != losses[1]:
        found["losses"] = _first(*losses)
    for process in range(processes):
        lines = [(run / f"records_{process}.jsonl").read_text().splitlines() for run in (left, right)]
        if lines[0] != lines[1]:
            found[f"records of process {process}"] = _first(*lines)
    sums = [_checksums(run) for run in (left, right)]
    if sums[0] != sums[1]:
        found["final state"] = _first(*(sorted(s.items()) for s in sums))
    return found


def _first(left: Sequence[Any], right: Sequence[Any]) -> str:
    for a, b in zip(left, right, strict=False):
        if a != b:
            return f"{a} against {b}"
    return f"{len(left)} against {len(right)} entries"


def _checksums(run: Path) -> dict[str, list[Any]]:
    newest = max((path for path in (run / CHECKPOINTS).glob("*") if path.name.isdecimal()), key=lambda p: int(p.name))
    return read_meta(newest)["arrays"]


def left_over(left: Path, right: Path) -> list[str]:
    """Names that only the second run has.

    Both keep the last few checkpoints; in the second, one saved on SIGTERM may be among them.
    """
    names = [
        {path.relative_to(run).as_posix() for folder in (run, run / CHECKPOINTS) for path in folder.iterdir()}
        for run in (left, right)
    ]
    kept = [{name for name in found if re.fullmatch(rf"{CHECKPOINTS}/\d+", name)} for found in names]
    more = [] if len(kept[1]) > len(kept[0]) else kept[1]
    return sorted(names[1] - names[0] - set(more))
