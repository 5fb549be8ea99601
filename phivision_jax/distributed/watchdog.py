"""No silent stall: one thread per process that says where it is, and ends it when it is nowhere for too long.

A hung collective, a file system that does not answer and a deadlock look the same from outside: a training that says
nothing. Here each is a message with the place where it hangs, every thread's stack, and an exit that whoever started
the process answers by starting it again.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
from pathlib import Path

import jax

from phivision_jax.distributed import heartbeat
from phivision_jax.distributed.heartbeat import FAILED, HEARTBEAT_S, HUNG, LAUNCHER, RENEWED_S, UNWRITTEN_S

_TICK_S = 0.5
_FROZEN_S = 300.0


class Watchdog:
    """Told of everything that happens; ends the process when nothing does.

    Args:
      run: the run's directory.
      limit_s: how long nothing may happen, unless ``alive`` says otherwise.
      limit_name: what a user changes to wait longer.

    Raises:
      ValueError: when another start of this run is still at work.
    """

    STARTING_S = 3600.0
    """For what takes long by its nature: compiling, reading and writing a checkpoint of hundreds of gigabytes."""

    def __init__(self, run: Path, limit_s: float, limit_name: str = "step_timeout_s") -> None:
        self._process = jax.process_index()
        self._run, self._default_s, self._limit_name = run, limit_s, limit_name
        self._launcher = int(os.environ.get(LAUNCHER, 0))
        self._host = socket.gethostname()
        heartbeat.refuse_another_start(run, self._process, RENEWED_S, _TICK_S)
        self._last = ("starting", 0, time.monotonic(), self.STARTING_S)
        self._written = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        self._thread.start()

    def alive(self, phase: str, step: int | None = None, limit_s: float | None = None) -> None:
        """This is what the process does from now on; costs nothing.

        Args:
          phase: for a person: "compiling", "data", "step", "saving".
          step: the newest step, where it has changed.
          limit_s: how long this may take; ``STARTING_S`` for what is long by its nature.
        """
        self._last = (phase, self._last[1] if step is None else step, time.monotonic(), limit_s or self._default_s)

    def close(self) -> None:
        """Nothing more is awaited; the last heartbeat says "ended"."""
        self._over.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._beat("ended", self._last[1])

    def _watch(self) -> None:
        beaten = -HEARTBEAT_S
        while not self._over.wait(_TICK_S):
            now = time.monotonic()
            phase, step, since, limit = self._last
            if now - beaten >= HEARTBEAT_S:
                beaten = now
                self._beat(phase, step)
                # Should native code keep Python's lock, this thread cannot run either; faulthandler's needs no lock.
                faulthandler.dump_traceback_later(_FROZEN_S, exit=True, file=sys.__stderr__ or sys.stderr)
            if now - since > limit:
                self._end(phase, step, now - since, limit)
            if self._launcher and not heartbeat.exists(self._launcher):
                print("the launcher of this process has died; the process ends too", file=sys.stderr, flush=True)
                os._exit(HUNG)

    def _beat(self, phase: str, step: int) -> None:
        beat: heartbeat.Heartbeat = {
            "process": self._process,
            "phase": phase,
            "step": step,
            "time": time.time(),
            "pid": os.getpid(),
            "host": self._host,
        }
        try:
            heartbeat.write(self._run, beat)
            self._written = time.monotonic()
        except OSError as error:  # without a launcher nobody reads them: what must be written will tell of the disk
            if self._launcher and time.monotonic() - self._written > UNWRITTEN_S:
                print(
                    f"process {self._process} ({self._host}) has not been able to write its heartbeat for "
                    f"{time.monotonic() - self._written:.0f} s and ends: {error}; see to the disk and start again",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(FAILED)

    def _end(self, phase: str, step: int, silent: float, limit: float) -> None:
        raise_it = f"; {self._limit_name} allows more" if limit == self._default_s else ""
        print(
            f"process {self._process} ({self._host}, pid {os.getpid()}) hangs: nothing has happened for {silent:.0f} s "
            f"since {phase!r} of step {step} began, and no more than {limit:.0f} s are given to it{raise_it}. "
            "It ends here; started again, training goes on from the newest checkpoint. Where each thread stands:",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(sys.__stderr__ or sys.stderr, all_threads=True)
        self._beat(f"hung in {phase}", step)
        os._exit(HUNG)
