"""The directory of an evaluation in a bucket: it is written on disk, since nothing can be appended to an object, and
copied once a minute.
"""

import hashlib
import shutil
import time
from pathlib import Path
from typing import Self

from phivision_jax.evaluation.results import IMAGES, RUN, results_file
from phivision_jax.io import storage

_EVERY_S = 60.0


class Mirror:
    """A directory on disk, and its copy in a bucket if that is where the evaluation belongs; a context manager.

    Args:
      place: a directory, or gs://bucket/folder.
      shard: whose results this process writes; those of others are only read.
      restart: remove what is in the bucket.

    Raises:
      ValueError: for a place of another kind.
      StorageError: when the bucket does not answer.

    Attributes:
      directory: on disk.
    """

    def __init__(self, place: str, shard: int, *, restart: bool = False) -> None:
        found = storage.location(place)
        self._remote = None if isinstance(found, Path) else found
        self._own, self._copied, self._last = results_file(Path(), shard).name, dict[str, tuple[int, int]](), 0.0
        if self._remote is None:
            self.directory = Path(place)
            return
        storage.check(self._remote)
        if restart:
            storage.remove(self._remote)
        key = hashlib.sha256(str(self._remote).encode()).hexdigest()[:16]
        self.directory = storage.scratch() / "evaluations" / key
        # What is on disk is of an earlier start on this machine, or of an evaluation that is gone.
        run, local = self._remote / RUN, self.directory / RUN
        with storage.wrap_storage_errors(run):
            is_same = run.exists() and local.exists() and run.read_bytes() == local.read_bytes()
        if not is_same:
            shutil.rmtree(self.directory, ignore_errors=True)
        self.pull()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.push()

    def pull(self) -> None:
        """Copy settings and results from the bucket, but no results that this process has written itself."""
        if self._remote is not None:
            names = [name for name in storage.files(self._remote) if name == RUN or name.startswith("results-")]
            keep = self._own if (self.directory / self._own).exists() else ""
            storage.download(self._remote, self.directory, [name for name in names if name != keep])

    def push(self, *, due: bool = False) -> None:
        """Copy what has changed to the bucket.

        Args:
          due: only if a minute has passed since the last time.
        """
        if self._remote is None or (due and time.monotonic() - self._last < _EVERY_S):
            return
        changed = {}
        for name in storage.files(self.directory):
            is_of_others = name.startswith("results-") and name != self._own
            status = (self.directory / name).stat()
            state = status.st_size, status.st_mtime_ns
            if not (name.startswith(".") or is_of_others or self._copied.get(name) == state):
                changed[name] = state
        # In this order: results name images, and reports are of the results.
        first = [name for name in changed if name == RUN or name.startswith(f"{IMAGES}/")]
        last = [name for name in changed if name not in (*first, self._own)]
        for names in (first, [name for name in changed if name == self._own], last):
            if names:
                storage.upload(self.directory, self._remote, names)
        self._copied |= changed
        self._last = time.monotonic()
