"""Account for a process's wall time: each second since it started is counted once, under one of these names.

    step         a training step runs on the devices: ``run`` has dispatched it and its metrics are not there yet

and while none runs, by what the host does:

    compile      compiling the step and the validation loss
    restore      restoring or initializing the state
    data         waiting for the next batch
    host         placing a batch on the devices
    checkpoint   the loop waits for a save to begin, or for the one before to end
    evaluate     scoring answers, measuring the validation loss
    other        everything else: Python's start and imports, planning, logging

Devices run asynchronously, so host work costs nothing while a step runs; only the time for which the devices wait (▲ a
step is dispatched) counts against the run:

    host         data   host  ▲  data                  host   ▲  checkpoint
    devices                   step n · · · · · ·              step n + 1 · ·
    counted      data   host  step               data  host   step           checkpoint

A thread waits for each step's metrics to see its end, at worst late by the interpreter's switch interval (5 ms). Up to
``AHEAD`` steps may be dispatched, so that the devices do not wait for the host between two.

``goodput.jsonl`` of a run holds the accounts of all its starts. Their sum has two more names:

    lost         steps that a later start repeated, because the process died after its last checkpoint
    down         from the last line of a start (one is written with the metrics) to the beginning of the next
"""

import contextlib
import itertools
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from phivision_jax.distributed import run_lock
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
AHEAD = 2
"""Steps that may be dispatched at a time: one running, one waiting."""


class Start(NamedTuple):
    """One start of a run, from its lines."""

    began: float
    """Seconds since 1970."""
    ended: float
    """Time of its last line."""
    lines: Sequence[tuple[int, dict[str, float]]]
    """(step, seconds by name since ``began``) of every line that has a step; the first is where it resumed."""
    seconds: dict[str, float]
    """Seconds by name, from its last line."""


class Goodput(contextlib.AbstractContextManager["Goodput"]):
    """The account of one process. Use sections and ``run`` on the thread that created it.

        with Goodput(run) as goodput:
            with goodput("restore"): …
            goodput.begin(first)
            …
            state, metrics = goodput.run(compiled, state, batch)

    Args:
      run: the run's directory; None keeps the account in memory only (all processes but the first).
    """

    def __init__(self, run: Path | None) -> None:
        self._run, self._section, self._since, age = run, "other", time.perf_counter(), process_age()
        self.seconds = {name: 0.0 for name in MEANING if name not in ("lost", "down")} | {"other": age}
        """Seconds of this process so far, by name."""
        self._changed = threading.Condition()
        self._running, self._finished, self._step_end = 0, 0, 0.0
        self._durations: list[float] = []
        self._row_start = (0, dict(self.seconds))
        self._earlier = read_starts(run) if run else []
        self._before, self._began = dict.fromkeys(MEANING, 0.0), time.time() - age
        self.write(None)
        self._dispatched: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._watch, name="goodput", daemon=True).start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After an error, that error is reported, not that this cannot be written either.
        with contextlib.suppress(OSError) if kind else contextlib.nullcontext():
            self.close()

    @contextlib.contextmanager
    def __call__(self, section: str) -> Iterator[None]:
        """Count the time inside under this name; a nested section interrupts the outer one."""
        outer = self._section
        self._enter(section)
        try:
            yield
        finally:
            self._enter(outer)

    def run[State, Metrics](self, step: Callable[..., tuple[State, Metrics]], *args: Any) -> tuple[State, Metrics]:
        """Dispatch a training step, ``step(*args)``, once fewer than ``AHEAD`` are running; counted until its metrics
        are there.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._running < AHEAD)
            self._charge()
            self._running += 1
        try:
            state, metrics = step(*args)
        except BaseException:
            self._finish()
            raise
        self._dispatched.put((metrics,))
        return state, metrics

    def drain(self) -> None:
        """Wait until no step is running."""
        with self._changed:
            self._changed.wait_for(lambda: not self._running)

    def begin(self, step: int) -> None:
        """Training begins after this step, 0 or the one restored; steps of earlier starts beyond it are lost."""
        self._before = account_of([*self._earlier, Start(self._began, self._began, [(step, {})], {})])
        self.write(step)
        self._row_start = (self._finished, dict(self.seconds))

    def write(self, step: int | None) -> None:
        """Append the account to ``goodput.jsonl``, as it is after this step."""
        self._step = step
        seconds = {name: round(value, 4) for name, value in self._charge().items()}
        if self._run is not None:
            start = {"start": len(self._earlier), "began": self._began}
            jsonl.append(self._run / FILE, start | {"time": time.time(), "step": step, "seconds": seconds})

    def close(self) -> None:
        """Append the last line and stop counting."""
        self._dispatched.put(None)
        self.write(self._step)

    def row(self) -> dict[str, float]:
        """Metrics of the interval since the last row; waits for running steps.

        Returns:
          ``goodput``: share of all time since the run first started that went to steps that count.
          ``time/device_s``, ``time/data_s``, ``time/host_s``: seconds per step that the devices worked, waited for data
          and waited for a batch to be placed. ``time/step_s``: the sum of these and of ``other``. Without a step in the
          interval, the four are absent.
        """
        self.drain()
        (finished, then), now = self._row_start, self._charge()
        self._row_start = self._finished, now
        total = sum(self._before.values()) + sum(now.values())
        row = {"goodput": (self._before["step"] + now["step"]) / max(total, 1e-9)}
        if steps := self._finished - finished:
            device, data, host, other = ((now[n] - then[n]) / steps for n in ("step", "data", "host", "other"))
            row |= {"time/device_s": device, "time/data_s": data, "time/host_s": host}
            row["time/step_s"] = device + data + host + other
        return row

    def durations(self) -> list[float]:
        """Seconds from end to end of the steps finished since the last call, without time that is not step, data or
        host.
        """
        with self._changed:
            durations, self._durations = self._durations, []
        return durations

    def _charge(self) -> dict[str, float]:
        """Count the time since the last call; return a copy of the account."""
        with self._changed:
            now = time.perf_counter()
            self.seconds["step" if self._running else self._section] += now - self._since
            self._since = now
            return dict(self.seconds)

    def _enter(self, section: str) -> None:
        with self._changed:
            self._charge()
            self._section = section

    def _finish(self) -> None:
        with self._changed:
            self._charge()
            self._running -= 1
            self._finished += 1
            before, self._step_end = self._step_end, sum(self.seconds[name] for name in ("step", "data", "host"))
            self._durations.append(self._step_end - before)
            self._changed.notify_all()

    def _watch(self) -> None:
        import jax  # not needed for reports, which begin faster without it

        while dispatched := self._dispatched.get():
            # A step that fails on the devices has ended too; the error is raised where its metrics are fetched.
            with contextlib.suppress(Exception):
                jax.block_until_ready(dispatched)
            self._finish()


def process_age() -> float:
    """Seconds since this process started; 0 where the system does not report it (no /proc)."""
    if not (ticks := run_lock.start_of(os.getpid())):
        return 0.0
    return max(time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"), 0.0)


def read_starts(run: Location) -> list[Start]:
    """Starts of a run, in order, without damaged lines.

    Raises:
      StorageError: when the bucket cannot be read.
    """
    storage.check(run)
    starts, names = [], [name for name in MEANING if name not in ("lost", "down")]
    rows = jsonl.read(run / FILE, start=int, began=float, time=float, seconds=dict)
    for row in rows:
        row["seconds"] = {name: s for name in names if jsonl.is_a(s := row["seconds"].get(name), float)}
    sound = [row for row in rows if len(row["seconds"]) == len(names)]
    for _, group in itertools.groupby(sound, key=lambda row: row["start"]):
        *_, last = rows = list(group)
        lines = [(row["step"], row["seconds"]) for row in rows if jsonl.is_a(row.get("step"), int)]
        starts.append(Start(last["began"], last["time"], lines, last["seconds"]))
    return starts


def account_of(starts: Sequence[Start]) -> dict[str, float]:
    """Seconds of all starts by name, lost steps subtracted from "step"; these are interpolated between lines."""
    account = dict.fromkeys(MEANING, 0.0)
    for i, start in enumerate(starts):
        later, lost = starts[i + 1 :], 0.0
        resumed = [other.lines[0][0] for other in later if other.lines]
        if resumed and start.lines:
            steps, spent = zip(*((step, seconds["step"]) for step, seconds in start.lines), strict=True)
            lost = spent[-1] - float(np.interp(min(resumed), steps, spent))
        down = max(later[0].began - start.ended, 0.0) if later else 0.0
        for name, seconds in (*start.seconds.items(), ("lost", lost), ("step", -lost), ("down", down)):
            account[name] += seconds
    return account


def report(run: Location) -> str:
    """The time of a run over all its starts, as a table.

    Raises:
      ValueError: when the directory holds no account.
    """
    starts = read_starts(run)
    if not starts:
        raise ValueError(f"{run} holds no {FILE}: it is not a run's directory, or the run has not started")
    account, last = account_of(starts), starts[-1].lines
    reached = f"at step {last[-1][0]:,}" if last else "before its first step"
    count = "1 start" if len(starts) == 1 else f"{len(starts)} starts"
    total = sum(account.values())
    lines = [f"{run}: {count}, {reached}, {duration(total)}"]
    for name, seconds in sorted(account.items(), key=lambda item: (item[0] != "step", -item[1])):
        if seconds > 0 or name == "step":
            lines.append(f"  {name:<11}{seconds / max(total, 1e-9):>7.1%}{duration(seconds):>16}   {MEANING[name]}")
    lines.append(f"goodput {account['step'] / max(total, 1e-9):.1%}")
    # From each start's first step on, with lost steps.
    stepping = dict.fromkeys(starts[-1].seconds.keys() - {"compile"}, 0.0)
    for name, start in itertools.product(stepping, (start for start in starts if start.lines)):
        stepping[name] += start.seconds[name] - start.lines[0][1][name]
    if (total := sum(stepping.values())) > 0:
        rest = sorted(((s / total, name) for name, s in stepping.items() if name != "step"), reverse=True)
        parts = ", ".join(f"{name} {share:.1%}" for share, name in rest if share >= 0.0005)
        idle = f"{sum(share for share, _ in rest):.1%}" + (f" ({parts})" if parts else "")
        lines.append(f"not stepping, once compiled and restored: {idle}")
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Format seconds: "12.3 s", "4 min 05 s", "3 h 07 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
