"""What a process of a training tells whoever started it: heartbeats while it lives, an exit code when it ends.

    run/heartbeat/process_3.json   {"process": 3, "phase": "step", "step": 1234, "time": 1790000000.0, "pid": …, …}

Knows nothing of JAX, so that a launcher costs nothing.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TypedDict

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


def read(run: Path) -> list[Heartbeat]:
    """The newest heartbeat of each process, as far as they can be read."""
    beats: list[Heartbeat] = []
    for path in sorted((run / _DIRECTORY).glob("process_*.json")):
        with contextlib.suppress(OSError, ValueError):
            beats.append(json.loads(path.read_text()))
    return beats
