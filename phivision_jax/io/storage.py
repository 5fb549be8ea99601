"""Directories on disk and in buckets (``gs://bucket/folder``) behind one interface.

A local path is a ``pathlib.Path``, and nothing is imported for it. A place in a bucket is an ``epath.Path``, which also
has ``/``, ``read_text``, ``exists``, ``is_dir``, ``iterdir``, ``mkdir`` and ``rename``. The functions here do what it
lacks, or what it does one object after another.

A bucket has no directories, only objects whose names contain slashes. An object is written completely or not at all,
and replaced atomically; nothing can be appended to it. Renaming a directory copies each object and removes it, so it is
not atomic.
"""

import contextlib
import errno
import functools
import importlib.util
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phivision_jax.io.messages import shorten

if TYPE_CHECKING:
    from etils import epath

type Location = Path | epath.Path

REMOTE = "gs://"
SCRATCH = "PHIVISION_SCRATCH"
"""Environment variable: the directory for data on their way to or from a bucket; see ``scratch``."""
_CONCURRENT = 16
"""Objects that are transferred at the same time: a request mostly waits."""
_PIECE = 8 * 2**20
"""Bytes of a large object that are sent in one request; each transfer holds twice as many in memory."""
_CONNECT_S, _SILENT_S = 10.0, 30.0
"""After so long without a connection, or without a byte, a request is sent again: six times in all."""
_FOREIGN = ("gcsfs", "aiohttp", "requests", "google", "fsspec", "asyncio")
"""Packages whose errors mean that the communication with a bucket failed."""


class StorageError(OSError):
    """A bucket cannot be reached, or denies access; the message is a sentence for the user."""


class Unreachable(StorageError):
    """The bucket does not answer; it may answer later."""


def location(place: str | Location) -> Location:
    """Parse a place: ``gs://…`` is in a bucket, everything else on disk. The result is absolute, without "..".

    Raises:
      ValueError: for another scheme; without a bucket's name; when the package for buckets is not installed.
    """
    text = os.fspath(place)
    if not text.startswith(REMOTE):
        if "://" in text:
            raise ValueError(f"{text}: give a local directory or gs://bucket/folder; other schemes are not supported")
        path = Path(text).absolute()
        return path.resolve() if ".." in path.parts else path  # TensorStore does not accept ".."
    bucket, _, key = text.removeprefix(REMOTE).partition("/")
    if not bucket:
        raise ValueError(f"{text} names no bucket; give gs://bucket/folder")
    if key.strip("/"):
        check_names([key.strip("/")], REMOTE + bucket)
    _prepare()
    from etils import epath

    return epath.Path(text)


def is_remote(path: Location | str) -> bool:
    """True if a place is in a bucket."""
    return not isinstance(path, Path) and os.fspath(path).startswith(REMOTE)


def scratch() -> Path:
    """The local directory for data on their way to or from a bucket; it may be removed at any time.

    By default each user has another, because files of other users could not be removed.
    """
    return Path(os.environ.get(SCRATCH) or f"{tempfile.gettempdir()}/phivision-{os.getuid()}")


def check_names(names: Iterable[str], where: Location | str) -> None:
    """Refuse names of objects in a bucket that would not be files below a directory: objects may have any name.

    Args:
      names: relative to ``where``.

    Raises:
      ValueError: naming the first.
    """
    names = set(names)
    for name in sorted(names):
        parts = name.split("/")
        if {"", ".", ".."} & set(parts) or "\\" in name or "\0" in name:
            problem = "which is no path below a directory"
        elif any("/".join(parts[:n]) in names for n in range(1, len(parts))):
            problem = "below another object, which cannot be a file and a directory"
        else:
            continue
        raise ValueError(f"{where} has an object {shorten(name)!r}, {problem}; remove it, or use another folder")


def check_links(directory: Location) -> None:
    """Refuse symbolic links out of a directory of unknown origin: what they point to would be read, copied, exported.

    In a snapshot of a Hugging Face cache they may point to the cache's blobs.

    Raises:
      ValueError: naming the first.
    """
    if not isinstance(directory, Path):
        return
    root = directory.resolve()
    inside = [root, *([root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [])]
    for path in sorted(directory.rglob("*")):
        if path.is_symlink():
            target = Path(os.path.realpath(path))
            if not any(target.is_relative_to(place) for place in inside):
                problem = f"a link to {shorten(str(target))}, outside of its directory"
                raise ValueError(f"{path} is {problem}; if it can be trusted, copy the directory with cp -rL")


@functools.cache
def _prepare() -> None:
    """Configure the packages before the first request. Orbax reaches buckets through the same file system."""
    if importlib.util.find_spec("gcsfs") is None:
        raise ValueError("gs:// needs the package gcsfs: pip install 'phivision_jax[gcs]'")
    os.environ.setdefault("EPATH_USE_TF", "false")  # epath would use TensorFlow where it is installed, and its errors
    import aiohttp
    import fsspec.config

    # A cached listing would not show what TensorStore or another host has written since.
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=_SILENT_S)
    fsspec.config.conf["gcs"] = {"use_listings_cache": False, "requests_timeout": timeout}
    # TensorStore, which reads and writes arrays, would wait forever.
    os.environ.setdefault("TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS", f"{_CONNECT_S:.0f}")
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", f"{_SILENT_S:.0f}")
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")
    # Their log messages are raised as errors too, which become one sentence instead of a page.
    for name in ("gcsfs", "fsspec"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _fs() -> Any:
    _prepare()
    import fsspec

    return fsspec.filesystem("gcs", finalize_on_close=True)  # the instance that epath uses


@contextlib.contextmanager
def wrap_storage_errors(place: Location | str) -> Iterator[None]:
    """Turn errors of the communication with a bucket into ``StorageError``. A missing file stays an error of its own.

    Raises:
      StorageError: with a sentence that begins with ``place`` and suggests a remedy.
    """
    try:
        yield
    except Exception as error:
        if not str(place).startswith(REMOTE) or isinstance(error, StorageError | FileNotFoundError | FileExistsError):
            raise
        foreign = type(error).__module__.split(".")[0] in _FOREIGN
        if not foreign and not isinstance(error, TimeoutError | PermissionError) and "Forbidden: " not in str(error):
            raise
        raise _storage_error(place, error) from error


def _storage_error(place: Location | str, error: Exception) -> StorageError:
    cause = " ".join(str(error).split())[:300] or "timeout"
    code = str(getattr(error, "code", ""))
    if code == "401" or type(error).__module__.startswith("google.auth"):
        return StorageError(f"{place}: not authenticated ({cause}); run gcloud auth application-default login")
    if code == "403" or isinstance(error, PermissionError) or "Forbidden: " in cause:
        roles = "the roles Storage Object User and Storage Legacy Bucket Reader on the bucket"
        return StorageError(f"{place}: access denied ({cause}); the account needs {roles}")
    return Unreachable(f"{place}: the bucket does not answer ({cause}); check the network and try again")


def check(path: Location) -> None:
    """Verify with one request that a bucket exists and may be read; does nothing for a local path.

    Raises:
      StorageError: when it does not exist, or cannot be read.
    """
    if not is_remote(path):
        return
    bucket, _, key = os.fspath(path).removeprefix(REMOTE).partition("/")
    with wrap_storage_errors(path):
        try:
            _fs().call("GET", "b/{}/o", bucket, prefix=key, maxResults=1)
        except FileNotFoundError as error:
            create = f"create it with gcloud storage buckets create {REMOTE}{bucket}"
            raise StorageError(f"{path}: there is no bucket {bucket}; {create}") from error


def children(path: Location) -> list[Location]:
    """The entries of a directory; none when there is no such directory.

    Preferable to ``is_dir``, which gcsfs answers with False when a bucket does not respond.

    Raises:
      StorageError: when the bucket cannot be listed.
    """
    found: list[Location] = []
    with wrap_storage_errors(path), contextlib.suppress(FileNotFoundError, NotADirectoryError):
        found += path.iterdir()
    if is_remote(path):
        check_names([child.name for child in found], path)
    return found


def files(path: Location) -> dict[str, int]:
    """Sizes in bytes of all files below a directory, by relative name with slashes; none without such a directory.

    Raises:
      ValueError: as ``check_names`` and ``check_links``.
      StorageError: when the bucket cannot be listed.
    """
    if not is_remote(path):
        check_links(path)
        found = sorted(p for p in Path(path).rglob("*") if p.is_file())
        return {p.relative_to(path).as_posix(): p.stat().st_size for p in found}
    root = os.fspath(path).removeprefix(REMOTE).rstrip("/") + "/"
    with wrap_storage_errors(path):
        try:
            listed = _fs().find(root, detail=True)
        except FileNotFoundError:
            check(path)
            return {}
    # Google's console makes an object for a folder.
    names = [name for name in sorted(listed) if name.startswith(root) and not name.endswith("/")]
    sizes = {name.removeprefix(root): int(listed[name]["size"]) for name in names}
    check_names(sizes, path)
    return sizes


def read_range(path: Location, start: int, count: int) -> bytes:
    """Bytes ``start`` to ``start + count`` of a file, fewer at its end. May be called from any thread.

    Raises:
      FileNotFoundError: when there is no such file.
      StorageError: when the bucket does not answer.
    """
    if not is_remote(path):
        with Path(path).open("rb") as file:
            file.seek(start)
            return file.read(count)
    if not count:
        return b""
    with wrap_storage_errors(path):
        try:
            return _fs().cat_file(os.fspath(path), start=start, end=start + count)
        except FileNotFoundError as error:
            raise _missing(path) from error


def download(source: Location, target: Path, names: Iterable[str] | None = None, description: str = "") -> None:
    """Copy files from below a directory in a bucket to below a local one, several at a time.

    Args:
      names: relative, as from ``files``; default: all.
      description: shows progress under this title.

    Raises:
      FileNotFoundError: when one does not exist.
      ValueError: as ``check_names``; nothing is written then.
      StorageError: when the bucket does not answer.
    """
    names = list(files(source) if names is None else names)
    check_names(names, source)
    target.mkdir(parents=True, exist_ok=True)
    remote, local = ([os.fspath(folder / name) for name in names] for folder in (source, target))
    with wrap_storage_errors(source), _progress(description, len(names)) as callback:
        try:
            _fs().get(remote, local, callback=callback, batch_size=_CONCURRENT)
        except FileNotFoundError:
            missing = sorted(set(names) - files(source).keys())
            raise _missing(source / missing[0] if missing else source) from None


def upload(source: Path, target: Location, names: Iterable[str] | None = None, description: str = "") -> None:
    """Copy files from below a local directory to below one in a bucket; arguments and errors as ``download``."""
    names = list(files(source) if names is None else names)
    local, remote = ([os.fspath(folder / name) for name in names] for folder in (source, target))
    with wrap_storage_errors(target), _progress(description, len(names)) as callback:
        _fs().put(local, remote, callback=callback, batch_size=_CONCURRENT, chunksize=_PIECE)


def create(path: Location, content: bytes) -> bool:
    """Create a file unless there is one: of several processes, on any hosts, exactly one gets True.

    A reader of a local file may find it empty at first.

    Raises:
      StorageError: when the bucket does not answer.
    """
    with wrap_storage_errors(path):
        try:
            if is_remote(path):
                _fs().pipe_file(os.fspath(path), content, mode="create")
            else:
                with Path(path).open("xb") as file:
                    file.write(content)
        except FileExistsError:
            return False
    return True


def remove(path: Location) -> None:
    """Remove a directory in a bucket and everything below it, if it exists."""
    with wrap_storage_errors(path), contextlib.suppress(FileNotFoundError):
        _fs().rm(os.fspath(path), recursive=True)


def _missing(path: Location) -> FileNotFoundError:
    """An error that names the file as the user does; gcsfs names the request."""
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path))


@contextlib.contextmanager
def _progress(description: str, total: int) -> Iterator[Any]:
    """A bar that fsspec advances."""
    from fsspec.callbacks import Callback

    from phivision_jax.io.progress import bar

    with bar(description, total, shown=bool(description)) as advance:
        callback = Callback()
        callback.relative_update = advance
        yield callback
