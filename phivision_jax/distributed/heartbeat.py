"""Heartbeats, which say where a process is while it runs, and exit codes, which say whether to start it again.

    run/heartbeat/process_3.json   {"process": 3, "phase": "step", "step": 1234, "time": 1790000000.0, "pid": …, …}

Imports no JAX, so that the launcher stays small.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from pathlib import Path
from typing import TypedDict
from urllib.parse import quote

from phivision_jax.io import atomic, storage
from phivision_jax.io.storage import Location

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
RENEWED_S = 15.0
"""Seconds after which a heartbeat that was not renewed counts as a dead process."""
UNWRITTEN_S = 35.0
"""Seconds after which a launched process that cannot write its heartbeat exits with a message, before the launcher
takes it for hung."""
LAUNCHER = "PHIVISION_LAUNCHER"
"""Environment variable with the process id of the launcher; when that dies, its processes end."""

_DIRECTORY = "heartbeat"


class Heartbeat(TypedDict):
    """One file of ``run/heartbeat``."""

    process: int
    phase: str
    step: int
    time: float
    """Seconds since 1970."""
    pid: int
    host: str


def write(run: Path, beat: Heartbeat) -> None:
    """Replace a process's heartbeat.

    Raises:
      OSError: when it cannot be written.
    """
    path = run / _DIRECTORY / f"process_{beat['process']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(path, json.dumps(beat), durable=False)


def read(run: Location) -> list[Heartbeat]:
    """The newest readable heartbeat of each process."""
    beats: list[Heartbeat] = []
    for path in sorted((run / _DIRECTORY).glob("process_*.json")):
        with contextlib.suppress(OSError, ValueError):
            beats.append(json.loads(path.read_text()))
    return beats


def mirrors(url: str) -> Path:
    """This machine's directory for the local copies of a run in a bucket, one per process: PROCESS/NAME."""
    return storage.scratch() / quote(url.removeprefix(storage.REMOTE).rstrip("/"), safe="")


def local_directories(run: str) -> list[Path]:
    """Directories to which this machine's processes write a run's small files; none for an empty name."""
    if not run.startswith(storage.REMOTE):
        return [Path(run)] if run else []
    return sorted(mirrors(run).glob("*/*"))


def refuse_another_start(run: Location, process: int, renewed_s: float = RENEWED_S, tick_s: float = 0.5) -> None:
    """Make sure that this process number is not running already: two would remove each other's files.

    Args:
      renewed_s: seconds after which a heartbeat that was not renewed counts as a dead process.

    Raises:
      ValueError: when it renews its heartbeat.
    """
    beat = _running(run, process)
    if beat is None or time.time() - beat["time"] > renewed_s:
        return
    deadline = time.monotonic() + renewed_s
    while time.monotonic() < deadline:
        time.sleep(tick_s)
        now = _running(run, process)
        if now is None:
            return
        if now["time"] != beat["time"]:
            raise ValueError(
                f"{run} is being trained already: process {now['process']} (pid {now['pid']} on {now['host']}) is at "
                f"step {now['step']}; end it first, or use another --run"
            )


def _running(run: Location, process: int) -> Heartbeat | None:
    """The heartbeat of a process number, unless that process is known to have ended."""
    beat = next((beat for beat in read(run) if beat["process"] == process), None)
    if beat is None or beat["phase"] == "ended" or beat["phase"].startswith("hung"):
        return None
    return None if beat["host"] == socket.gethostname() and not exists(beat["pid"]) else beat


def exists(pid: int) -> bool:
    """True if this machine has a process with this id."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
