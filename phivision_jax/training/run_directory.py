"""Where a run is: a directory, or a place in a bucket with a mirror of its small files on this machine.

    runs/mine              everything is there, and this module does nothing
    gs://bucket/runs/mine  checkpoints/, compilation_cache/    written to the bucket by those who make them
                           everything else                     a mirror: fetched at the start, sent back as it changes

The bucket is the truth. A start clears its mirror and fetches it anew, so it may be on any machine. What has changed
is sent every ``PUSH_S`` seconds beside training, before each checkpoint and at the end. Before, not after: a checkpoint
that is there never lacks the lines of the steps up to it; lines beyond it are dropped by the start that goes on there.

Objects are whole or not there, directories are not: of ``assets/`` and ``plan/`` a kill may leave a part. So each
counts once ``assets.whole``, which is sent after its files, is there; or a checkpoint, since a run that somebody has
copied to a bucket has no such marks.

Each process has a mirror of its own and sends what itself has changed; but of the files that bear a process's number
(``records_1.jsonl``) its own alone, and the first process those of processes that an earlier start had and this one has
not. Knows nothing of JAX, like ``heartbeat.py``.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self
from urllib.parse import quote

from phivision_jax.checkpoint.layout import CHECKPOINTS
from phivision_jax.distributed import heartbeat
from phivision_jax.io import storage
from phivision_jax.io.storage import Location

CACHE = "compilation_cache"
PUSH_S = 30.0
"""Seconds between two looks at what has changed."""
RENEWED_S = PUSH_S + heartbeat.RENEWED_S
"""A heartbeat in the bucket that is not renewed for so long is not that of a living process."""
PATIENCE_S = 300.0
"""For so long a bucket that does not answer is tried again before a checkpoint, and at the end."""

_NOT_FETCHED = (CHECKPOINTS, CACHE, "heartbeat", "profile", "tensorboard", "wandb")
"""No start reads what an earlier one has put there, or not from the mirror."""
_NUMBERED = re.compile(r"(?:^|/)(?:records_|skipped_|quarantine-|process_)(\d+)\.")


class RunDirectory:
    """One process's way to a run's files.

        with RunDirectory("gs://bucket/runs/mine", process) as directory:
            …                        files are read and written below ``directory.local``
            directory.push()         before a checkpoint

    Args:
      run: a directory, or ``gs://…``.
      process: number of this process.
      processes: how many there are.
      say: told, once, that sending beside training has failed.
      keeps: False: nothing is sent, and the mirror is one of its own, removed at the end.

    Raises:
      ValueError: for a place of another kind; where another start of this run is at work in the bucket.
      StorageError: when the bucket cannot be read.
    """

    def __init__(
        self,
        run: str | Location,
        process: int = 0,
        processes: int = 1,
        say: Callable[[str], None] = print,
        *,
        keeps: bool = True,
    ) -> None:
        self.url = storage.location(run)
        """Where the run is, for those who write there themselves."""
        self.local = self.url if isinstance(self.url, Path) else _mirror(str(self.url), process, keeps)
        """Where its small files are."""
        self.mirrored = not isinstance(self.url, Path)
        """Whether that is a mirror, of this process alone."""
        self._process, self._processes, self._say, self._keeps = process, processes, say, keeps
        self._sent: dict[str, tuple[int, int]] = {}
        self._sending = threading.Lock()
        self._cut_off = False
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if not self.mirrored:
            if self._keeps:
                self.local.mkdir(parents=True, exist_ok=True)
            return self
        self._pull()
        if self._keeps:
            self._thread = threading.Thread(target=self._push_now_and_then, daemon=True, name="run directory")
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._thread is not None:
            self._over.set()
            if kind is None:
                self._thread.join()
                self.push()
            elif not self._cut_off:  # what has failed is to be told, not what fails after it
                with contextlib.suppress(OSError):
                    self._push()
        elif self.mirrored:
            shutil.rmtree(self.local.parent, ignore_errors=True)

    def push(self) -> None:
        """Send what has changed; returns when it is in the bucket. Tries for ``PATIENCE_S`` where that does not answer.

        Raises:
          StorageError: when it cannot be sent.
        """
        deadline = time.monotonic() + PATIENCE_S
        while self.mirrored and self._keeps:
            try:
                return self._push()
            except storage.Unreachable:
                if time.monotonic() > deadline:
                    raise

    def give(self, name: str) -> None:
        """The first process has made this directory, "assets" or "plan": from now on the run has it."""
        mark = self.local / f"{name}.whole"
        if self.mirrored and self._keeps and not mark.exists():
            mark.touch()
            self.push()

    def take(self, name: str) -> None:
        """What the first process has given, for another one that does not have it yet."""
        if self.mirrored and not (self.local / name).exists():
            with self._sending:
                storage.download(self.url / name, self.local / name)
                self._sent |= {file: state for file, state in self._files().items() if file.startswith(f"{name}/")}

    def _pull(self) -> None:
        if self._keeps:
            storage.check(self.url)
            with storage.wrap_storage_errors(self.url):
                heartbeat.refuse_another_start(self.url, self._process, RENEWED_S)
        found = storage.files(self.url)  # not before: the other start may have sent something until it ended
        if self.local.exists():  # not before: the other start may be on this machine
            shutil.rmtree(self.local)
        begun = any(name.startswith(f"{CHECKPOINTS}/") for name in found)
        parts = [name for name in ("assets", "plan") if not begun and f"{name}.whole" not in found]
        unwanted = tuple(f"{name}/" for name in (*_NOT_FETCHED, *parts))
        storage.download(self.url, self.local, [name for name in found if not name.startswith(unwanted)])
        self._sent = self._files()

    def _files(self) -> dict[str, tuple[int, int]]:
        """(bytes, time of the last change) of everything that is not about to be renamed."""
        found = {}
        for path in self.local.rglob("*"):
            relative = path.relative_to(self.local)
            passing = any(part.startswith(".") or part.endswith((".partial", ".tmp")) for part in relative.parts)
            with contextlib.suppress(FileNotFoundError):
                if not passing and path.is_file():
                    stat = path.stat()
                    found[relative.as_posix()] = (stat.st_size, stat.st_mtime_ns)
        return found

    def _push(self) -> None:
        with self._sending:
            self._cut_off = True
            now = self._files()
            changed = [name for name, state in now.items() if self._sent.get(name) != state and self._is_mine(name)]
            # Marks after what they stand for.
            marks = [name for name in changed if name.endswith(".whole")]
            for names in ([name for name in changed if name not in marks], marks):
                storage.upload(self.local, self.url, names)
            self._sent |= {name: now[name] for name in changed}
            self._cut_off = False

    def _is_mine(self, name: str) -> bool:
        found = _NUMBERED.search(name)
        number = int(found[1]) if found else self._process
        return number == self._process or (self._process == 0 and number >= self._processes)

    def _push_now_and_then(self) -> None:
        told = False
        while not self._over.wait(PUSH_S):
            try:
                self._push()
            except Exception as error:
                if not told:
                    told = True
                    self._say(f"{error}; training goes on, and its log is sent as soon as that is possible again")


def _mirror(url: str, process: int, keeps: bool) -> Path:
    name = url.rstrip("/").rpartition("/")[2]
    if not keeps:
        return Path(tempfile.mkdtemp(prefix="phivision-")) / name
    return _mirrors(url) / str(process) / name


def _mirrors(url: str) -> Path:
    """One directory per run, so that no two of them share a mirror."""
    return storage.scratch() / quote(url.removeprefix(storage.REMOTE).rstrip("/"), safe="")


def local_directories(run: str) -> list[Path]:
    """Where the processes of this machine write the run's small files; none for an empty name. Asks no bucket."""
    if not run.startswith(storage.REMOTE):
        return [Path(run)] if run else []
    return sorted(_mirrors(run).glob("*/*"))
