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

``goodput.jsonl`` of a run holds the accounts of all its starts; ``goodput_report.py`` adds them up.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from phivision_jax.io import jsonl
from phivision_jax.training.telemetry.goodput_report import FILE, Account, account_of, read_starts

SECTIONS = ("compile", "restore", "data", "host", "checkpoint", "evaluate", "other")
"""Host activities that are counted."""
AHEAD = 2
"""Steps that may be dispatched at a time: one running, one waiting."""


class Goodput:
    """The account of one process. Use sections and ``run`` on the thread that created it.

        with Goodput(run) as goodput:
            with goodput("restore"): …
            goodput.begin(first)
            …
            state, metrics = goodput.run(compiled, state, batch)

    Args:
      run: the run's directory; None keeps the account in memory only (all processes but the first).
      clock: monotonic seconds.
      now: seconds since 1970.
      wait: blocks until the arrays that it receives are computed.
      age: seconds that this process had run before ``clock`` was first called; default: as the system reports.
    """

    def __init__(
        self,
        run: Path | None,
        *,
        clock: Callable[[], float] = time.perf_counter,
        now: Callable[[], float] = time.time,
        wait: Callable[[Any], object] = jax.block_until_ready,
        age: float | None = None,
    ) -> None:
        self._clock, self._now, self._wait, self._run = clock, now, wait, run
        self._section, self._since = "other", clock()
        age = process_age() if age is None else age
        self.seconds = dict.fromkeys(("step", *SECTIONS), 0.0) | {"other": age}
        """Seconds of this process so far, by name."""
        self._changed = threading.Condition()
        self._running = 0
        self._durations: list[float] = []
        self._finished, self._step_end = 0, 0.0
        self._row_start = (0, dict(self.seconds))
        self._earlier = read_starts(run) if run else []
        self._before = Account()
        self._start, self._began = len(self._earlier), now() - age
        self.write(None)
        self._dispatched: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._watch, name="goodput", daemon=True).start()

    def __enter__(self) -> Goodput:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After an error, that error is reported, not that this cannot be written either.
        with contextlib.suppress(OSError) if kind else contextlib.nullcontext():
            self.close()

    @contextlib.contextmanager
    def __call__(self, section: str) -> Iterator[None]:
        """Count the time inside under one of ``SECTIONS``; a nested section interrupts the outer one."""
        if section not in SECTIONS:
            raise ValueError(f"goodput: {section!r} is none of {', '.join(SECTIONS)}")
        outer = self._enter(section)
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
        self._before = account_of(self._earlier, resumed=(step, self._began))
        self.write(step)
        self._row_start = (self._finished, dict(self.seconds))

    def write(self, step: int | None) -> None:
        """Append the account to ``goodput.jsonl``, as it is after this step."""
        self._step = step
        with self._changed:
            self._charge()
            seconds = {name: round(value, 4) for name, value in self.seconds.items()}
        if self._run is not None:
            line = {"start": self._start, "began": self._began, "time": self._now(), "step": step, "seconds": seconds}
            jsonl.append(self._run / FILE, line)

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
        with self._changed:
            self._charge()
            (finished, then), now = self._row_start, (self._finished, dict(self.seconds))
            self._row_start = now
        total = self._before.total + sum(now[1].values())
        row = {"goodput": (self._before.seconds["step"] + now[1]["step"]) / total if total > 0 else 0.0}
        if steps := now[0] - finished:
            each = {name: (seconds - then[name]) / steps for name, seconds in now[1].items()}
            row |= {"time/device_s": each["step"], "time/data_s": each["data"], "time/host_s": each["host"]}
            row["time/step_s"] = sum(row[f"time/{name}_s"] for name in ("device", "data", "host")) + each["other"]
        return row

    def durations(self) -> list[float]:
        """Seconds from end to end of the steps finished since the last call, without time that is not step, data or
        host.
        """
        with self._changed:
            durations, self._durations = self._durations, []
        return durations

    def _charge(self) -> None:
        now = self._clock()
        self.seconds["step" if self._running else self._section] += now - self._since
        self._since = now

    def _enter(self, section: str) -> str:
        with self._changed:
            self._charge()
            outer, self._section = self._section, section
        return outer

    def _finish(self) -> None:
        with self._changed:
            self._charge()
            self._running -= 1
            self._finished += 1
            before, self._step_end = self._step_end, sum(self.seconds[name] for name in ("step", "data", "host"))
            self._durations.append(self._step_end - before)
            self._changed.notify_all()

    def _watch(self) -> None:
        while dispatched := self._dispatched.get():
            # A step that fails on the devices has ended too; the error is raised where its metrics are fetched.
            with contextlib.suppress(Exception):
                self._wait(dispatched[0])
            self._finish()


def process_age() -> float:
    """Seconds since this process started; 0 where the system does not report it (no /proc)."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # field 22, starttime: proc(5)
        return max(time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"), 0.0)
    except (OSError, AttributeError):
        return 0.0
