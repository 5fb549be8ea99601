"""End a process that hangs: a thread that knows what the process does and for how long that may take.

A hung collective, an unresponsive file system and a deadlock look the same from outside: nothing happens. The watchdog
turns each into a message with the place where it hangs, a stack of every thread, and an exit code that asks for a
restart.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

import jax

from phivision_jax.distributed import heartbeat
from phivision_jax.distributed.heartbeat import FAILED, HEARTBEAT_S, HUNG, LAUNCHER, RENEWED_S, UNWRITTEN_S

LONG_S = 3600.0
"""Limit for slow phases: compiling, reading and writing a checkpoint of hundreds of gigabytes."""
_TICK_S = 0.5
_FROZEN_S = 300.0


class Watchdog:
    """Ends the process when a phase exceeds its limit; writes heartbeats meanwhile.

    Args:
      run: the run's directory.
      limit_s: seconds that a phase may take (``step_timeout_s``), unless ``alive`` gives another limit.

    Raises:
      ValueError: when another start of this run is still running.
    """

    def __init__(self, run: Path, limit_s: float) -> None:
        self._process = jax.process_index()
        self._run, self._default_s = run, limit_s
        self._launcher = int(os.environ.get(LAUNCHER, 0))
        self._host = socket.gethostname()
        heartbeat.refuse_another_start(run, self._process, RENEWED_S, _TICK_S)
        self._step, self._last = 0, ("starting", LONG_S, time.monotonic())
        self._written = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        self._thread.start()

    @property
    def phase(self) -> tuple[str, float]:
        """The current phase and its limit in seconds."""
        return self._last[:2]

    def alive(self, phase: str, limit_s: float | None = None, *, step: int | None = None) -> None:
        """Enter a phase, such as "saving"; costs nothing.

        Args:
          limit_s: seconds that it may take; ``LONG_S`` for slow ones.
          step: the newest step, if it has changed.
        """
        self._step = self._step if step is None else step
        self._last = (phase, limit_s or self._default_s, time.monotonic())

    def close(self) -> None:
        """Stop watching; the last heartbeat's phase is "ended"."""
        self._over.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._beat("ended")

    def _watch(self) -> None:
        beaten = -HEARTBEAT_S
        while not self._over.wait(_TICK_S):
            now = time.monotonic()
            phase, limit, since = self._last
            if now - beaten >= HEARTBEAT_S:
                beaten = now
                self._beat(phase)
                # If native code keeps the GIL, this thread cannot run either; faulthandler's thread needs no GIL.
                faulthandler.dump_traceback_later(_FROZEN_S, exit=True, file=sys.__stderr__ or sys.stderr)
            if now - since > limit:
                self._report_hang(phase, now - since, limit)
            if self._launcher and not heartbeat.exists(self._launcher):
                self._exit(HUNG, "the launcher of this process has died; the process ends too")

    def _beat(self, phase: str) -> None:
        now, pid, process = time.time(), os.getpid(), self._process
        beat = heartbeat.Heartbeat(process=process, phase=phase, step=self._step, time=now, pid=pid, host=self._host)
        try:
            heartbeat.write(self._run, beat)
            self._written = time.monotonic()
        except OSError as error:  # without a launcher nobody reads heartbeats: writing logs will report the disk
            silent = time.monotonic() - self._written
            if self._launcher and silent > UNWRITTEN_S:
                self._exit(
                    FAILED,
                    f"process {self._process} ({self._host}) could not write its heartbeat for {silent:.0f} s "
                    f"and ends: {error}; check the disk and start again",
                )

    def _report_hang(self, phase: str, silent: float, limit: float) -> NoReturn:
        raise_it = " (step_timeout_s raises this limit)" if limit == self._default_s else ""
        print(
            f"process {self._process} ({self._host}, pid {os.getpid()}) hangs: {phase!r} at step {self._step} has run "
            f"for {silent:.0f} s, longer than the limit of {limit:.0f} s{raise_it}. The process ends; a restart "
            "continues from the newest checkpoint. Stacks of all threads:",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(sys.__stderr__ or sys.stderr, all_threads=True)
        self._beat(f"hung in {phase}")
        os._exit(HUNG)

    def _exit(self, code: int, message: str) -> NoReturn:
        print(message, file=sys.stderr, flush=True)
        os._exit(code)
