"""The lock of a run: of all starts of one run, on any hosts, one trains.

    run/owner/3.json   {"token": "9f…", "host": "tpu-0", "pid": 4711, "since": "2026-…", "renewed": 17, …}

The process that has created the file with the highest number owns the run. A file is created only if it does not exist,
which is atomic on disks, on NFS and in buckets: of several starts that find owner 3 gone, one creates number 4. Clocks
are never compared. An owner is gone when

- its file states that it has ended, or
- it ran on this machine, and no process has its id and its start time, or
- it ran elsewhere, and its file has not changed while this process has watched it for ``SILENT_S``.

The owner renews its file every ``RENEW_S``. It ends when its file is gone or another has a higher number: it was
suspended for so long that another start has taken the run over, or a user has removed the file.

Imports no JAX.
"""

import contextlib
import datetime
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from phivision_jax.distributed.heartbeat import FAILED, exists
from phivision_jax.io import atomic, storage
from phivision_jax.io.messages import shorten
from phivision_jax.io.read_json import parse_json
from phivision_jax.io.storage import Location

DIRECTORY = "owner"
RENEW_S = 10.0
"""Seconds between two renewals."""
SILENT_S = 60.0
"""Seconds without a renewal after which an owner on another machine counts as gone."""
_TICK_S = 0.5


class LostError(ValueError):
    """Another start has taken the run over."""


class RunLock:
    """Ownership of a run, for the process that starts it (the first of several).

        with RunLock(run):
            …

    Args:
      run: the run's directory; created if need be.
      log: receives a line when the start has to wait.

    Raises:
      ValueError: when another process trains this run; nothing was touched then.
      StorageError: when the bucket cannot be read or written.
    """

    def __init__(self, run: Location, log: Callable[[str], None] = print) -> None:
        self._run, self._log, self._number, self._renewed = run, log, 0, 0.0
        self._owner: dict[str, Any] = {"token": secrets.token_hex(8), "host": socket.gethostname(), "pid": os.getpid()}
        self._owner |= {"machine": machine(), "started": start_of(os.getpid()), "renewed": 0, "ended": False}
        self._owner["since"] = datetime.datetime.now(datetime.UTC).isoformat(" ", "seconds")
        self._writing, self._over = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._renew_regularly, daemon=True, name="run lock")

    def __enter__(self) -> Self:
        storage.check(self._run)
        with storage.wrap_storage_errors(self._run):
            self._acquire()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._owner["ended"] = True
        if time.monotonic() - self._renewed < SILENT_S:  # else the disk or bucket does not answer
            with contextlib.suppress(LostError):
                self.renew()
        self._number = 0

    def check(self) -> None:
        """Make sure that no other start can have taken the run over; costs nothing soon after a renewal.

        Raises:
          LostError: when one has.
        """
        if time.monotonic() - self._renewed > SILENT_S:
            self.renew()

    def renew(self) -> None:
        """Renew the lock, if it is held; a disk or bucket that does not answer is left to other writes to report.

        Raises:
          LostError: when another start has taken the run over.
        """
        with self._writing, contextlib.suppress(OSError), storage.wrap_storage_errors(self._run):
            if not self._number:
                return
            number, owner = self._newest()
            if owner.get("token") != self._owner["token"]:
                raise LostError(f"{self._run} was taken from this process; its owner now: {describe(owner)}")
            began = time.monotonic()
            self._owner["renewed"] += 1
            atomic.write(self._file(number), json.dumps(self._owner), durable=False)
            self._renewed = began

    def _acquire(self) -> None:
        watched, since = None, 0.0
        while (found := self._newest())[1].get("token") != self._owner["token"]:
            number, owner = found
            alive, changed = is_alive(owner), watched not in (None, found)
            if alive or (alive is None and owner and changed):  # renewed, or just taken, by another machine
                problem = f"{self._run} is being trained already, by {describe(owner)}"
                raise ValueError(f"{problem}; end it first, or use another --run")
            if watched is None and alive is None:
                sign = f"waiting until that has shown no sign of life for {SILENT_S:.0f} s"
                remedy = f"if it has ended for certain, remove {self._file(number)}"
                self._log(f"{self._run} is owned by {describe(owner)}: {sign}; {remedy}")
            if watched != found:
                watched, since = found, time.monotonic()
            if alive is None and time.monotonic() - since <= SILENT_S:
                time.sleep(_TICK_S)
                continue
            if isinstance(self._run, Path):
                (self._run / DIRECTORY).mkdir(parents=True, exist_ok=True)
            storage.create(self._file(number + 1), json.dumps(self._owner).encode())
            watched = None
        self._number, self._renewed = found[0], time.monotonic()
        for path in storage.children(self._run / DIRECTORY):
            if path.stem.isdecimal() and int(path.stem) < self._number:
                path.unlink(missing_ok=True)

    def _newest(self) -> tuple[int, dict[str, Any]]:
        """The highest number and its owner: empty while its file is being written, or when that is damaged."""
        names = [path.stem for path in storage.children(self._run / DIRECTORY)]
        if not (number := max((int(name) for name in names if name.isdecimal()), default=0)):
            return 0, {"ended": True}
        with contextlib.suppress(FileNotFoundError, ValueError):
            owner = parse_json(self._file(number).read_bytes(), "")
            if owner.keys() >= self._owner.keys() and type(owner["pid"]) is int:
                return number, owner
        return number, {}

    def _file(self, number: int) -> Location:
        return self._run / DIRECTORY / f"{number}.json"

    def _renew_regularly(self) -> None:
        while not self._over.wait(RENEW_S):
            try:
                self.renew()
            except LostError as error:
                print(f"{error}; this process ends", file=sys.stderr, flush=True)
                os._exit(FAILED)


def machine() -> str:
    """Names the running kernel and the process ids that this process sees; empty where the system does not tell."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


def start_of(pid: int) -> int | None:
    """Clock ticks between the machine's start and that of a process; 0 if it has ended but not been waited for.

    None if it does not exist, or cannot be seen.
    """
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return 0 if fields[0] in "ZX" else int(fields[19])  # fields 3, state, and 22, starttime: proc(5)
    return None


def is_alive(owner: dict[str, Any]) -> bool | None:
    """True if an owner's process runs; None if that cannot be seen from this machine."""
    if owner.get("ended"):
        return False
    if not owner or not owner["machine"] or owner["machine"] != machine():
        return None
    return exists(owner["pid"]) and start_of(owner["pid"]) in (owner["started"], None)


def describe(owner: dict[str, Any]) -> str:
    """Names an owner to the user."""
    if "host" not in owner:
        return "nobody, because its file or its directory is gone" if owner else "a process whose file cannot be read"
    return shorten(f"process {owner['pid']} on {owner['host']} since {owner['since']} by its clock", 200)
