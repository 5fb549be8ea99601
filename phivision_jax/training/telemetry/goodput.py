"""Where a process's wall time goes. Every second since it was started is counted once:

    step         a training step is with the devices: ``run`` has handed it over, its metrics are not there yet

and while none is, by what the host is busy with:

    compile      compiling the step, and the backend compiler at any other time
    restore      bringing the state back, or making it
    data         waiting for the next batch
    host         laying a batch out over the devices
    checkpoint   the loop stands still while a save begins, or the one before ends
    evaluate     scoring answers, measuring the validation loss
    other        everything else: Python's start and imports, making the plan, writing metrics

Devices work on their own, so nothing is lost by what the host does while a step runs. What counts against the run is
what the devices wait for (▲ a step is handed over):

    host         data   host  ▲  data                  host   ▲  checkpoint
    devices                   step n · · · · · ·              step n + 1 · ·
    counted      data   host  step               data  host   step           checkpoint

The end of a step is seen by a thread that waits for its metrics, late by the interpreter's switch interval (5 ms) where
the host computes in Python at that moment. ``AHEAD`` steps may be under way, so that the devices need not wait for the
host between two.

The accounts of all starts of a run stand in ``goodput.jsonl``. Between them lie

    lost         steps that a later start did again, since the process died after its last checkpoint
    down         from the last line of a start to the beginning of the next (a line is written at every log)
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

from phivision_jax.training.telemetry.goodput_report import Account, account_of, append_line, read_starts

SECTIONS = ("compile", "restore", "data", "host", "checkpoint", "evaluate", "other")
"""What the host may be busy with."""
AHEAD = 2
"""Steps that may be with the devices: one at work, one waiting for it."""
_COMPILED = "/jax/core/compile/backend_compile_duration"


class Goodput:
    """The account of one process. Sections and ``run`` belong to the thread that made it.

        with Goodput(run) as goodput:
            with goodput("restore"): …
            goodput.begin(first)
            …
            state, metrics = goodput.run(compiled, state, batch)

    Args:
      run: the run's directory; None keeps the account in memory only (every process but the first).
      clock: seconds, from anywhere, never backwards.
      now: seconds since 1970.
      wait: returns when the arrays that it is given have been computed.
      age: seconds for which this process had run already when ``clock`` was asked first; default: what the system says.
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
        """Of this process so far, by what they went to."""
        self._changed = threading.Condition()
        self._with_devices = 0
        self._finished, self._stepping = 0, 0.0
        self._durations: list[float] = []
        self._row = (0, dict(self.seconds))
        self._step: int | None = None
        self._earlier = read_starts(run) if run else []
        self._before = Account()
        self._start, self._began = len(self._earlier), now() - age
        self._write()
        self._thread = threading.current_thread()
        self._handed: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._watch, name="goodput", daemon=True).start()
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def __enter__(self) -> Goodput:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After an error that one is to be told, not that this could not be written either.
        with contextlib.suppress(OSError) if kind else contextlib.nullcontext():
            self.close()

    # -----------------------------------------------------------------------------------------------------------------
    # What happens.

    @contextlib.contextmanager
    def __call__(self, section: str) -> Iterator[None]:
        """The host is busy with one of ``SECTIONS``; inside another section, with this one alone."""
        if section not in SECTIONS:
            raise ValueError(f"goodput: {section!r} is none of {', '.join(SECTIONS)}")
        outer = self._enter(section)
        try:
            yield
        finally:
            self._enter(outer)

    def run[State, Metrics](self, step: Callable[..., tuple[State, Metrics]], *args: Any) -> tuple[State, Metrics]:
        """``step(*args)``, which gives (state, metrics): a training step, counted until its metrics are there.

        Waits first, until fewer than ``AHEAD`` steps are with the devices.
        """
        with self._changed:
            while self._with_devices >= AHEAD:
                self._changed.wait()
            self._charge()
            self._with_devices += 1
        try:
            state, metrics = step(*args)
        except BaseException:
            self._finish()
            raise
        self._handed.put((metrics,))
        return state, metrics

    def drain(self) -> None:
        """Wait until no step is with the devices."""
        with self._changed:
            while self._with_devices:
                self._changed.wait()

    def compiled(self, seconds: float) -> None:
        """The last so many seconds went to the compiler, unless a step was running all the while."""
        with self._changed:
            if not self._with_devices:
                seconds = min(seconds, self._clock() - self._since)
                self.seconds["compile"] += seconds
                self._since += seconds
            self._charge()

    def begin(self, step: int) -> None:
        """Training begins after this step: 0, or the one restored. What earlier starts did beyond it is lost."""
        self._before = account_of(self._earlier, resumed=(step, self._began))
        self.write(step)
        self._row = (self._finished, dict(self.seconds))

    def write(self, step: int) -> None:
        """Append the account as it is after this step to ``goodput.jsonl``."""
        self._step = step
        self._write()

    def close(self) -> None:
        """Append the last line. Nothing is counted any more."""
        jax.monitoring.unregister_event_duration_listener(self._on_event)
        self._handed.put(None)
        self._write()

    # -----------------------------------------------------------------------------------------------------------------
    # What is known of it.

    def row(self) -> dict[str, float]:
        """The newest interval for the metrics, from the row before to now; waits for the steps under way.

        Returns:
          ``goodput``: share of steps that count in all time since the run was first started.
          ``time/device_s``, ``time/data_s``, ``time/host_s``: seconds per step that the devices worked on it, and that
          they waited for its data and for its being laid out. ``time/step_s``: these three and what ``other`` took;
          absent, all four, when no step was taken.
        """
        self.drain()
        with self._changed:
            self._charge()
            (finished, then), now = self._row, (self._finished, dict(self.seconds))
            self._row = now
        total = self._before.total + sum(now[1].values())
        row = {"goodput": (self._before.seconds["step"] + now[1]["step"]) / total if total > 0 else 0.0}
        if steps := now[0] - finished:
            each = {name: (seconds - then[name]) / steps for name, seconds in now[1].items()}
            row |= {"time/device_s": each["step"], "time/data_s": each["data"], "time/host_s": each["host"]}
            row["time/step_s"] = sum(row[f"time/{name}_s"] for name in ("device", "data", "host")) + each["other"]
        return row

    def durations(self) -> list[float]:
        """Of the steps finished since this was asked last: seconds from the end of the step before to the end of this
        one, what went to anything but step, data and host left out."""
        with self._changed:
            durations, self._durations = self._durations, []
        return durations

    # -----------------------------------------------------------------------------------------------------------------

    def _charge(self) -> None:
        now = self._clock()
        self.seconds["step" if self._with_devices else self._section] += now - self._since
        self._since = now

    def _enter(self, section: str) -> str:
        with self._changed:
            self._charge()
            outer, self._section = self._section, section
        return outer

    def _finish(self) -> None:
        with self._changed:
            self._charge()
            self._with_devices -= 1
            self._finished += 1
            before, self._stepping = self._stepping, sum(self.seconds[name] for name in ("step", "data", "host"))
            self._durations.append(self._stepping - before)
            self._changed.notify_all()

    def _watch(self) -> None:
        while handed := self._handed.get():
            # A step that fails on the devices is finished too; whoever fetches its metrics is told the error.
            with contextlib.suppress(Exception):
                self._wait(handed[0])
            self._finish()

    def _on_event(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        if event == _COMPILED and threading.current_thread() is self._thread:
            self.compiled(duration_secs)

    def _write(self) -> None:
        with self._changed:
            self._charge()
            seconds = {name: round(value, 4) for name, value in self.seconds.items()}
        if self._run is not None:
            line = {"start": self._start, "began": self._began, "time": self._now(), "step": self._step}
            append_line(self._run, line | {"seconds": seconds})


def process_age() -> float:
    """Seconds since this process was started; 0 where the system does not say (no /proc)."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # field 22, starttime: proc(5)
        return max(time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"), 0.0)
    except (OSError, AttributeError):
        return 0.0
