"""Heartbeats, a watchdog that writes them and ends a process that hangs, and exit codes that ask for a restart or not.

    run/heartbeat/process_3.json   {"process": 3, "phase": "step", "step": 1234, "time": 1790000000.0, "pid": …, …}

A hung collective, an unresponsive file system and a deadlock look the same from outside: nothing happens. The watchdog
turns each into a message with the place where it hangs, a stack of every thread, and an exit code.

Imports no JAX, so that the launcher stays small.
"""

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote

from phivision_jax.io import atomic, jsonl, storage

FAILED = 1
"""Exit code of an error, which a restart would repeat; a message explains it."""
PREEMPTED = 75
"""Exit code after SIGTERM, with everything saved: start again (EX_TEMPFAIL of sysexits.h)."""
HUNG = 76
"""Exit code when nothing happened for too long, or the launcher has died: start again."""
LOST = 77
"""Exit code when another process has died: start again."""

HEARTBEAT_S = 10.0
"""Seconds between two heartbeats."""
UNWRITTEN_S = 35.0
"""Seconds after which a launched process that cannot write its heartbeat exits with a message, before the launcher
takes it for hung."""
LAUNCHER = "PHIVISION_LAUNCHER"
"""Environment variable with the process id of the launcher; when that dies, its processes end."""
LONG_S = 3600.0
"""Limit for slow phases: compiling, reading and writing a checkpoint of hundreds of gigabytes."""

_DIRECTORY = "heartbeat"
_TICK_S = 0.5
_FROZEN_S = 300.0


Heartbeat = dict[str, Any]
"""One file of ``run/heartbeat``; its time is in seconds since 1970."""


def write(run: Path, beat: Heartbeat) -> None:
    """Replace a process's heartbeat.

    Raises:
      OSError: when it cannot be written.
    """
    path = run / _DIRECTORY / f"process_{beat['process']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(path, json.dumps(beat) + "\n", durable=False)


def read(run: Path) -> list[Heartbeat]:
    """The newest readable heartbeat of each process."""
    beats: list[Heartbeat] = []
    for path in sorted((run / _DIRECTORY).glob("process_*.json")):
        with contextlib.suppress(OSError):
            beats += jsonl.read(path, process=int, phase=str, step=int, time=float, pid=int, host=str)
    return beats


def mirrors(url: str) -> Path:
    """This machine's directory for the local copies of a run in a bucket, one per process: PROCESS-RANDOM/NAME."""
    return storage.scratch() / quote(url.removeprefix(storage.REMOTE).rstrip("/"), safe="")


def local_directories(run: str) -> list[Path]:
    """Directories to which this machine's processes write a run's small files; none for an empty name."""
    if not run.startswith(storage.REMOTE):
        return [Path(run)] if run else []
    return sorted(mirrors(run).glob("*/*"))


def exists(pid: int) -> bool:
    """True if this machine has a process with this id."""
    try:
        os.kill(pid, 0)
    except (OSError, OverflowError) as error:
        return isinstance(error, PermissionError)
    return True


class Watchdog:
    """Ends the process when a phase exceeds its limit; writes heartbeats meanwhile.

    Args:
      run: the run's directory.
      limit_s: seconds that a phase may take (``step_timeout_s``), unless ``alive`` gives another limit.
      process: number of this process.
    """

    def __init__(self, run: Path, limit_s: float, process: int = 0) -> None:
        self._run, self._default_s, self._process = run, limit_s, process
        self._launcher, self._host = int(os.environ.get(LAUNCHER, 0)), socket.gethostname()
        self._name = f"process {process} ({self._host}, pid {os.getpid()})"
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
        """Enter a phase, such as "checkpoint"; costs nothing.

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
            if self._launcher and not exists(self._launcher):
                self._exit(HUNG, "the launcher of this process has died; the process ends too")

    def _beat(self, phase: str) -> None:
        beat = {"process": self._process, "phase": phase, "step": self._step, "time": time.time()}
        try:
            write(self._run, beat | {"pid": os.getpid(), "host": self._host})
            self._written = time.monotonic()
        except OSError as error:  # without a launcher nobody reads heartbeats: writing logs will report the disk
            silent = time.monotonic() - self._written
            if self._launcher and silent > UNWRITTEN_S:
                cause = f"could not write its heartbeat for {silent:.0f} s and ends: {error}"
                self._exit(FAILED, f"{self._name} {cause}; check the disk and start again")

    def _report_hang(self, phase: str, silent: float, limit: float) -> NoReturn:
        raise_it = " (step_timeout_s raises this limit)" if limit == self._default_s else ""
        long = f"has run for {silent:.0f} s, longer than the limit of {limit:.0f} s{raise_it}"
        print(f"{self._name} hangs: {phase!r} at step {self._step} {long}.", file=sys.stderr)
        remedy = "The process ends; a restart continues from the newest checkpoint."
        print(f"{remedy} Stacks of all threads:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.__stderr__ or sys.stderr, all_threads=True)
        self._beat(f"hung in {phase}")
        os._exit(HUNG)

    def _exit(self, code: int, message: str) -> NoReturn:
        print(message, file=sys.stderr, flush=True)
        os._exit(code)
