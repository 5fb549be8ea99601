"""Write files and directories completely or not at all.

Content is written under a temporary name beside its destination, flushed to disk, and renamed. Whatever happens before
the rename (an error, Ctrl-C, SIGKILL, a power cut), the destination is absent or unchanged. Temporary names begin with
a dot: ``.NAME.partial`` for a file, ``.NAME.partial-<random>`` for a directory. In a bucket an object is always written
completely, so ``write`` needs no rename there.
"""

import contextlib
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from phivision_jax.io.storage import Location


def write(path: Location, content: bytes | str, *, durable: bool = True) -> None:
    """Create or replace a file; readers see the old content or the new one, never a part.

    Args:
      path: its directory must exist.
      durable: also flush to disk before the rename, so that the file survives a power cut.
    """
    data = content.encode() if isinstance(content, str) else content
    if isinstance(path, Path):
        with new_file(path, durable=durable) as file:
            file.write(data)
    else:
        path.write_bytes(data)


@contextlib.contextmanager
def new_file(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Open a file that becomes ``path``, or replaces it, when the block ends without an exception.

    Raises:
      OSError: when it cannot be written; the error names the file.
    """
    partial = path.with_name(f".{path.name}.partial")
    with with_filename(path):
        try:
            with partial.open("wb") as file:
                yield file
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def new_directory(path: Path, *, replace: bool = False, log: Callable[[str], None] = print) -> Iterator[Path]:
    """Yield an empty directory that becomes ``path`` when the block ends without an exception; else it is removed.

    Args:
      replace: exchange an existing directory for the new one. A kill between the two renames leaves the old one as
        ``NAME.old-<random>``.
      log: receives a line for each directory that an interrupted process has left and that is removed.

    Raises:
      FileExistsError: when ``path`` exists at the end and ``replace`` is not given.
    """
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_directory(path, log) as partial:
        yield partial
        sync_tree(partial)
        old = None
        if os.path.lexists(path):
            if not replace:
                raise FileExistsError(f"{path} appeared meanwhile; not replacing it")
            old = path.rename(path.with_name(f"{path.name}.old-{secrets.token_hex(4)}"))
        partial.rename(path)
        _sync(path.parent)
        if old is not None:
            shutil.rmtree(old)


@contextlib.contextmanager
def temporary_directory(path: Path, log: Callable[[str], None] = print) -> Iterator[Path]:
    """Yield an empty ``.NAME.partial-<random>`` beside ``path``, locked while in use and removed at the end.

    Those that killed processes have left are removed first: their locks are free.
    """
    prefix = f".{path.name}.partial-"
    remove_abandoned(path.parent.glob(f"{prefix}*"), log)
    partial, locked = path.with_name(f"{prefix}{secrets.token_hex(4)}"), None
    try:
        partial.mkdir()
        locked = lock(partial)
        yield partial
    finally:
        _remove(partial)
        if locked is not None:
            os.close(locked)


def remove_abandoned(directories: Iterable[Path], log: Callable[[str], None] = lambda line: None) -> None:
    """Remove those of these directories that no process has locked: the ones that used them have ended."""
    for left in directories:
        with contextlib.suppress(OSError):  # in use, or just removed by another process
            os.close(lock(left))
            log(f"removing {left}, left by an interrupted process")
            shutil.rmtree(left)


def lock(path: Path) -> int:
    """Lock a directory, or a file that is created if need be with its directory, without waiting.

    Returns:
      A file descriptor; closing it, or the end of the process in any way, releases the lock.

    Raises:
      BlockingIOError: when another process holds the lock.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The former holder may remove or rename the path just before it releases the lock: then it is tried again.
        with contextlib.suppress(FileNotFoundError), contextlib.ExitStack() as stack:
            descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                stack.pop_all()
                return descriptor


def sync_tree(directory: Path) -> None:
    """Flush a directory and everything below it to disk: a rename must not become durable before its content."""
    for root, _, names in os.walk(directory):
        for name in names:
            _sync(Path(root, name))
        _sync(Path(root))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(directory: Path, seconds: float = 5.0) -> None:
    """Remove a directory into which threads of a library (TensorStore's) may still be writing."""
    until, absent = time.monotonic() + seconds, 0
    while absent < 10 and time.monotonic() < until:  # a late write makes the directory again
        absent = 0 if directory.exists() else absent + 1
        shutil.rmtree(directory, ignore_errors=True)
        time.sleep(0.02)


@contextlib.contextmanager
def with_filename(path: Path) -> Iterator[None]:
    """Add a file's name to an ``OSError`` that has none; a full disk by itself names no file.

    Raises:
      OSError: of the same kind, as "[Errno 28] No space left on device: 'runs/mine/metrics.jsonl'".
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
