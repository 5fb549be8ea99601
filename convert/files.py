"""Directories that appear whole or not at all.

Output is written to ``OUT.tmp-<random>`` beside its destination, flushed to disk, and renamed as the last act. Whatever
happens before (an error, Ctrl-C, SIGKILL, a power cut), nothing stands at OUT that was not finished. The writer holds
a lock on its directory that dies with it, so the next run can tell an abandoned one and clears it away.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def staged(
    out: Path, overwrite: bool = False, sources: Sequence[Path] = (), say: Callable[[str], None] = print
) -> Iterator[Path]:
    """A fresh directory that becomes ``out`` when the block ends without an exception, and is removed otherwise.

    Raises:
      ValueError: when ``out`` exists and ``overwrite`` is not given. With it, ``out`` is replaced after success, but
        only if it is a checkpoint of either kind and no source lies in it.
    """
    if os.path.lexists(out):
        if not overwrite:
            raise ValueError(f"{out} exists already; choose another destination or pass --overwrite")
        if not any((out / mark).is_file() for mark in ("config.json", "meta/metadata")):
            raise ValueError(f"{out} exists and is not a checkpoint; --overwrite does not replace it")
        for source in sources:
            if source.resolve().is_relative_to(out.resolve()):
                raise ValueError(f"{out} holds the source {source}; choose another destination")
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    for left in out.parent.glob(f"{out.name}.tmp-*"):
        if abandoned(left):
            say(f"removing {left}, left by a conversion that was interrupted")
            shutil.rmtree(left)
    unique = secrets.token_hex(4)
    tmp, lock = out.parent / f"{out.name}.tmp-{unique}", None
    try:
        tmp.mkdir()
        lock = os.open(tmp, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield tmp
        flush(tmp)
        if os.path.lexists(out):
            if not overwrite:
                raise ValueError(f"{out} appeared meanwhile; not replacing it")
            # Not a tmp name: killed between the two renames, the old checkpoint is still there for its owner to find.
            replaced = out.parent / f"{out.name}.old-{unique}"
            out.rename(replaced)
            tmp.rename(out)
            shutil.rmtree(replaced)
        else:
            tmp.rename(out)
        _flush_entry(out.parent)
    finally:
        _remove(tmp)
        if lock is not None:
            os.close(lock)


def _remove(directory: Path, seconds: float = 5.0) -> None:
    """Remove a directory into which writes of TensorStore's own threads may still be on their way."""
    until = time.monotonic() + seconds
    while directory.exists() and time.monotonic() < until:
        shutil.rmtree(directory, ignore_errors=True)
        time.sleep(0.02)


def abandoned(directory: Path) -> bool:
    """Whether the process that made this tmp directory is gone."""
    with suppress(OSError):
        file = os.open(directory, os.O_RDONLY)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        finally:
            os.close(file)
    return False


def flush(directory: Path) -> None:
    """Everything below, on disk: a rename must not become durable before what it names."""
    for root, _, files in os.walk(directory):
        for name in files:
            _flush_entry(Path(root, name))
        _flush_entry(Path(root))


def _flush_entry(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def free_bytes(path: Path) -> int:
    """Free space on the file system that ``path`` will be on."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def require_space(needed: int, out: Path) -> None:
    """Raises ValueError when ``needed`` bytes do not fit beside ``out``."""
    if needed > (free := free_bytes(out)):
        raise ValueError(f"{out}: needs {human(needed)}, but only {human(free)} are free there")


def copy_file(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def human(count: float) -> str:
    """1536 → ``1.5 kB``; decimal units, as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:.3g} TB"
