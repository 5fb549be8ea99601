"""A run's files: a directory, or a folder in a bucket with a local copy of its small files.

    runs/mine              everything is in the directory, and this module does nothing
    gs://bucket/runs/mine  checkpoints/, compilation_cache/    written to the bucket directly
                           everything else                     copied from the bucket at the start, and back on change

One process trains (``lock``); replays only read. The bucket is authoritative: a start fetches a copy of its own, so it
may be on any machine, and removes those of processes that have ended. Changed files are sent every ``PUSH_S`` seconds,
before each checkpoint and at the end. Before, not after: a checkpoint in the bucket never lacks the log of its steps;
log lines beyond it are dropped by the start that resumes there.

Before the first checkpoint, a kill may leave a part of ``assets/`` or ``plan/`` in the bucket, and a start that fails
may leave them for other settings. So both are made again by a start that finds no checkpoint. They belong to a run, not
to the user: ``setup.check`` refuses a directory that holds them and no run.

Each process has a copy of its own and sends the files that it changed. Files with a process number in their name
(``records_1.jsonl``) are sent by that process only, or by the first when this start has fewer processes than an earlier
one. Imports no JAX.
"""

import contextlib
import os
import re
import secrets
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Self

from phivision_jax.checkpoint.layout import CHECKPOINTS
from phivision_jax.distributed import heartbeat, run_lock
from phivision_jax.io import atomic, storage
from phivision_jax.io.messages import Log

CACHE = "compilation_cache"
PUSH_S = 30.0
"""Seconds between two looks for changed files."""
PATIENCE_S = 300.0
"""Seconds for which an unresponsive bucket is tried again, before a checkpoint and at the end."""

_NOT_FETCHED = (CHECKPOINTS, CACHE, run_lock.DIRECTORY, "heartbeat", "profile", "tensorboard", "wandb")
"""Folders that a start does not read, or not from its copy."""
MADE_AT_START = ("assets", "plan")
"""Folders that the first start makes, and the next one again if there is no checkpoint."""
_NUMBERED = re.compile(r"(?:^|/)(?:records_|skipped_|quarantine-|process_)(\d+)\.")


class RunDirectory:
    """The files of a run, for one process.

        directory = RunDirectory("gs://bucket/runs/mine", process)
        with directory.lock, directory:    the first process; others follow once it has the lock
            …                        read and write below ``directory.local``
            directory.push()         before a checkpoint

    Args:
      run: a directory, or ``gs://…``.
      process: number of this process.
      processes: number of processes.
      log: receives a line when sending in the background fails.
      readonly: send nothing, and remove the local copy at the end.

    Raises:
      ValueError: for another URL scheme.
      StorageError: when the bucket cannot be read.
    """

    def __init__(
        self, run: str, process: int = 0, processes: int = 1, log: Log = print, readonly: bool = False
    ) -> None:
        self.url = storage.location(run)
        """The run's place, for code that writes to the bucket directly."""
        self.mirrored = not isinstance(self.url, Path)
        """True if ``local`` is a copy, which belongs to this process only."""
        self.local = self.url if isinstance(self.url, Path) else _copy_of(str(self.url), process, readonly)
        """The run's small files."""
        self.lock = run_lock.RunLock(self.url, log)
        self._process, self._processes, self._log, self._readonly = process, processes, log, readonly
        self._locked: int | None = None
        self._sent: dict[str, tuple[int, int]] = {}
        self._sending = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._push_regularly, daemon=True, name="run directory")

    def __enter__(self) -> Self:
        if self.mirrored:
            self._fetch()
            if not self._readonly:
                self._thread.start()
        elif not self._readonly:
            self.local.mkdir(parents=True, exist_ok=True)
            for name in () if self._process or any((self.local / CHECKPOINTS).glob("*")) else MADE_AT_START:
                shutil.rmtree(self.local / name, ignore_errors=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._over.set()
        if self.mirrored and self._readonly:
            shutil.rmtree(self.local.parent, ignore_errors=True)
        elif self.mirrored and kind is None:
            self._thread.join()
            self.push()
        elif self.mirrored:
            # The first error is reported, not one that follows from it.
            with contextlib.suppress(OSError, run_lock.LostError):
                self._push()
        if self._locked is not None:
            os.close(self._locked)  # the copy stays for the launcher, and the next start removes it

    def push(self) -> None:
        """Send changed files; when this returns, they are in the bucket. Tries an unresponsive one for ``PATIENCE_S``.

        Raises:
          StorageError: when they cannot be sent.
          LostError: when another start has taken the run over.
        """
        deadline = time.monotonic() + PATIENCE_S
        while self.mirrored and not self._readonly:
            try:
                return self._push()
            except storage.Unreachable:
                if time.monotonic() > deadline:
                    raise

    def pull(self, name: str) -> None:
        """Fetch a directory that the first process has made and pushed, "assets" or "plan", if it is not here."""
        if self.mirrored and not (self.local / name).exists():
            with self._sending:
                storage.download(self.url / name, self.local / name)
                self._sent |= {file: state for file, state in self._files().items() if file.startswith(f"{name}/")}

    def _fetch(self) -> None:
        found = storage.files(self.url)
        if not self._readonly:
            atomic.remove_abandoned(heartbeat.mirrors(str(self.url)).glob(f"{self._process}-*"))
            self.local.parent.mkdir(parents=True)
            self._locked = atomic.lock(self.local.parent)
        begun = any(name.startswith(f"{CHECKPOINTS}/") for name in found)
        made_again = () if begun or self._readonly else MADE_AT_START
        for name in made_again if self._process == 0 else ():
            storage.remove(self.url / name)
        names = [name for name in found if name.split("/")[0] not in (*_NOT_FETCHED, *made_again)]
        storage.download(self.url, self.local, names)
        self._sent = self._files()

    def _files(self) -> dict[str, tuple[int, int]]:
        """(bytes, modification time) of every file that is not about to be renamed."""
        found = {}
        for path in self.local.rglob("*"):
            relative = path.relative_to(self.local)
            temporary = any(part.startswith(".") or part.endswith((".partial", ".tmp")) for part in relative.parts)
            with contextlib.suppress(FileNotFoundError):
                if not temporary and path.is_file():
                    stat = path.stat()
                    found[relative.as_posix()] = (stat.st_size, stat.st_mtime_ns)
        return found

    def _push(self) -> None:
        self.lock.check()
        with self._sending:
            now = self._files()
            changed = [name for name, state in now.items() if self._sent.get(name) != state and self._is_own(name)]
            storage.upload(self.local, self.url, changed)
            self._sent |= {name: now[name] for name in changed}

    def _is_own(self, name: str) -> bool:
        found = _NUMBERED.search(name)
        number = int(found[1]) if found else self._process
        return number == self._process or (self._process == 0 and number >= self._processes)

    def _push_regularly(self) -> None:
        reported = False
        while not self._over.wait(PUSH_S):
            try:
                self._push()
            except Exception as error:
                if not reported:
                    reported = True
                    self._log(f"{error}; training continues, and its logs are sent as soon as that is possible again")


def _copy_of(url: str, process: int, readonly: bool) -> Path:
    """The local copy's directory: no other process ever has the same."""
    name = url.rstrip("/").rpartition("/")[2]
    if readonly:
        return Path(tempfile.mkdtemp(prefix="phivision-")) / name
    return heartbeat.mirrors(url) / f"{process}-{secrets.token_hex(4)}" / name
