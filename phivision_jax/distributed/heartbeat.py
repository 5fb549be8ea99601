"""What a process of a training tells whoever started it: heartbeats while it lives, an exit code when it ends.

    run/heartbeat/process_3.json   {"process": 3, "phase": "step", "step": 1234, "time": 1790000000.0, "pid": …, …}

Knows nothing of JAX, so that a launcher costs nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from pathlib import Path
from typing import TypedDict

from phivision_jax.io.storage import Location

FAILED = 1
"""An error that starting again does not mend; a sentence says what it was."""
PREEMPTED = 75
"""Told to stop, and all that was trained is saved: start again (EX_TEMPFAIL of sysexits.h)."""
HUNG = 76
"""Nothing happened for too long, or whoever started the process has died: start again."""
LOST = 77
"""Another process has died: start again."""

HEARTBEAT_S = 10.0
"""Seconds between two of them."""
RENEWED_S = 15.0
"""A heartbeat that is not renewed for so many seconds is not that of a living process."""
UNWRITTEN_S = 35.0
"""Seconds for which a process tries to write one before it ends with a sentence, if a launcher looks after it: sooner
than the launcher would take it for hung."""
LAUNCHER = "PHIVISION_LAUNCHER"
"""Environment variable: id of the process that looks after this one. Without it this one would train on unseen."""

_DIRECTORY = "heartbeat"


class Heartbeat(TypedDict):
    """One file of the run's directory."""

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
    partial = path.with_suffix(".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(json.dumps(beat))
    partial.replace(path)


def read(run: Location) -> list[Heartbeat]:
    """The newest heartbeat of each process, as far as they can be read."""
    beats: list[Heartbeat] = []
    for path in sorted((run / _DIRECTORY).glob("process_*.json")):
        with contextlib.suppress(OSError, ValueError):
            beats.append(json.loads(path.read_text()))
    return beats


def refuse_another_start(run: Location, process: int, renewed_s: float = RENEWED_S, tick_s: float = 0.5) -> None:
    """Two trainings in one place would each remove what the other is writing.

    Args:
      renewed_s: a heartbeat that is not renewed for so long is not that of a living process.

    Raises:
      ValueError: when a process of this number is still at work on the run.
    """
    beat = _at_work(run, process)
    if beat is None or time.time() - beat["time"] > renewed_s:
        return
    deadline = time.monotonic() + renewed_s
    while time.monotonic() < deadline:
        time.sleep(tick_s)
        now = _at_work(run, process)
        if now is None:
            return
        if now["time"] != beat["time"]:
            raise ValueError(
                f"{run} is being trained already: process {now['process']} (pid {now['pid']} on {now['host']}) is at "
                f"step {now['step']}; end it first, or take another --run"
            )


def _at_work(run: Location, process: int) -> Heartbeat | None:
    """The heartbeat of a process of this number, unless it is known to be over."""
    beat = next((beat for beat in read(run) if beat["process"] == process), None)
    if beat is None or beat["phase"] == "ended" or beat["phase"].startswith("hung"):
        return None
    return None if beat["host"] == socket.gethostname() and not exists(beat["pid"]) else beat


def exists(pid: int) -> bool:
    """Whether there is such a process on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
