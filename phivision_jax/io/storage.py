"""Directories on this machine and in buckets (``gs://bucket/folder``), alike for whoever reads and writes them.

A local place is a ``pathlib.Path`` and everything stays as it is: nothing is imported for it. A bucket's is an
``epath.Path``, on which ``/``, ``read_text``, ``exists``, ``is_dir``, ``iterdir``, ``mkdir``, ``rename`` work too. What
it lacks, or does one object after the other, is here.

A bucket has no directories, only objects whose names have slashes. An object is written whole or not at all, and
replaced at once; it cannot be appended to. Renaming a directory copies each object and removes it, so it is not atomic.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib.util
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from etils import epath

type Location = Path | epath.Path

REMOTE = "gs://"
SCRATCH = "PHIVISION_SCRATCH"
"""Environment variable: the directory for what is on its way to or from a bucket; see ``scratch``."""
_AT_ONCE = 16
"""Objects that are fetched or written at the same time: a request waits far longer than it computes."""
_PIECE = 8 * 2**20
"""Bytes of a large object that are sent in one request: of each that is under way so much is in memory, twice."""
_CONNECT_S, _SILENT_S = 10.0, 30.0
"""After so long without a connection, or without a byte, a request is given up and sent again: six times in all."""
_FOREIGN = ("gcsfs", "aiohttp", "requests", "google", "fsspec", "asyncio")
"""Packages whose errors say that a bucket could not be spoken to."""


class StorageError(OSError):
    """A bucket cannot be reached, or does not allow it; the message is a sentence for the user."""


class Unreachable(StorageError):
    """It does not answer: another time it may."""


def location(place: str | Location) -> Location:
    """Where that is: ``gs://…`` in a bucket, all else on this machine.

    Raises:
      ValueError: of another scheme; without a bucket's name; when the package for buckets is not installed.
    """
    if isinstance(place, Path) or (not isinstance(place, str) and is_remote(place)):
        return place
    text = os.fspath(place)
    if not text.startswith(REMOTE):
        if "://" in text:
            raise ValueError(f"{text}: give a directory of this machine, or gs://bucket/folder; others are not known")
        return Path(text)
    if not text.removeprefix(REMOTE).split("/")[0]:
        raise ValueError(f"{text} names no bucket; give gs://bucket/folder")
    _prepare()
    from etils import epath

    return epath.Path(text)


def is_remote(path: Location | str) -> bool:
    return not isinstance(path, Path) and os.fspath(path).startswith(REMOTE)


def scratch() -> Path:
    """The directory of this machine for what is on its way to or from a bucket; it may be removed at any time.

    By default it is this user's own: whoever else shares the machine has others, which could not be removed.
    """
    return Path(os.environ.get(SCRATCH) or f"{tempfile.gettempdir()}/phivision-{os.getuid()}")


def absolute(path: Location) -> Location:
    return path.absolute() if isinstance(path, Path) else path


@functools.cache
def _prepare() -> None:
    """Once, before the first request. Orbax reaches buckets through the same file system."""
    if importlib.util.find_spec("gcsfs") is None:
        raise ValueError("gs:// needs the package gcsfs: pip install 'phivision_jax[gcs]'")
    os.environ.setdefault("EPATH_USE_TF", "false")  # with TensorFlow beside it epath would take that, and its errors
    import aiohttp
    import fsspec.config

    # A listing that is kept would not see what TensorStore or another host has written since.
    fsspec.config.conf["gcs"] = {
        "use_listings_cache": False,
        "requests_timeout": aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=_SILENT_S),
    }
    # TensorStore, through which arrays are read and written, would wait for ever.
    os.environ.setdefault("TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS", f"{_CONNECT_S:.0f}")
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", f"{_SILENT_S:.0f}")
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")
    # What it has to tell is raised as well, and said by us in one sentence instead of a page.
    for name in ("gcsfs", "fsspec"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _fs() -> Any:
    _prepare()
    import fsspec

    return fsspec.filesystem("gcs", finalize_on_close=True)  # the very one that epath takes


@contextlib.contextmanager
def wrap_storage_errors(place: Location | str) -> Iterator[None]:
    """Whatever goes wrong in here between us and a bucket becomes a ``StorageError``. A missing file stays one."""
    try:
        yield
    except Exception as error:
        if not str(place).startswith(REMOTE) or isinstance(error, StorageError | FileNotFoundError | FileExistsError):
            raise
        foreign = type(error).__module__.split(".")[0] in _FOREIGN
        if not foreign and not isinstance(error, TimeoutError | PermissionError) and "Forbidden: " not in str(error):
            raise
        raise _told(place, error) from error


def _told(place: Location | str, error: Exception) -> StorageError:
    said = " ".join(str(error).split())[:300] or "nothing came for too long"
    code = str(getattr(error, "code", ""))
    auth = type(error).__module__.startswith("google.auth")
    if code == "401" or auth:
        return StorageError(
            f"{place}: the bucket asks who you are ({said}); gcloud auth application-default login tells it"
        )
    if code == "403" or isinstance(error, PermissionError) or "Forbidden: " in said:
        return StorageError(
            f"{place}: this account may not do that ({said}); it needs the roles Storage Object User and "
            "Storage Legacy Bucket Reader on the bucket"
        )
    return Unreachable(f"{place}: the bucket does not answer ({said}); see to the network and try again")


def check(path: Location) -> None:
    """One request to the bucket: whether it is there and may be read. Nothing for a local path.

    Raises:
      StorageError: when not.
    """
    if not is_remote(path):
        return
    bucket, _, key = os.fspath(path).removeprefix(REMOTE).partition("/")
    with wrap_storage_errors(path):
        try:
            _fs().call("GET", "b/{}/o", bucket, prefix=key, maxResults=1)
        except FileNotFoundError as error:
            raise StorageError(
                f"{path}: there is no bucket {bucket}; gcloud storage buckets create {REMOTE}{bucket} makes it"
            ) from error


def children(path: Location) -> list[Location]:
    """What is in a directory; nothing where there is none.

    To be preferred to ``is_dir``, which for a bucket that does not answer is False (gcsfs has it so).

    Raises:
      StorageError: when the bucket cannot be listed.
    """
    with wrap_storage_errors(path), contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return list(path.iterdir())
    return []


def files(path: Location) -> dict[str, int]:
    """Every file below a directory: name relative to it, with slashes → bytes. Empty where there is none.

    Raises:
      StorageError: when the bucket cannot be listed.
    """
    if not is_remote(path):
        found = sorted(p for p in Path(path).rglob("*") if p.is_file())
        return {p.relative_to(path).as_posix(): p.stat().st_size for p in found}
    root = os.fspath(path).removeprefix(REMOTE).rstrip("/") + "/"
    with wrap_storage_errors(path):
        try:
            listed = _fs().find(root, detail=True)
        except FileNotFoundError:
            check(path)
            return {}
    return {
        name.removeprefix(root): int(entry["size"])
        for name, entry in sorted(listed.items())
        if name.startswith(root) and not name.endswith("/")  # a folder made in the console is an object of that name
    }


def read_json(path: Location) -> dict[str, Any]:
    """The contents of a JSON file.

    Raises:
      ValueError: when it is missing or not JSON, naming the file.
      StorageError: when the bucket does not answer.
    """
    try:
        with wrap_storage_errors(path):
            return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def read_range(path: Location, start: int, count: int) -> bytes:
    """Bytes ``start`` to ``start + count`` of a file; less at its end. From any thread.

    Raises:
      FileNotFoundError: when it is not there.
      StorageError: when the bucket does not answer.
    """
    if not is_remote(path):
        with Path(path).open("rb") as file:
            file.seek(start)
            return file.read(count)
    if not count:
        return b""
    with wrap_storage_errors(path), _named(path):
        return _fs().cat_file(os.fspath(path), start=start, end=start + count)


def download(source: Location, target: Path, names: Iterable[str] | None = None, description: str = "") -> None:
    """Copy files from below one directory to below another, several at once; each appears there whole.

    Args:
      names: relative, as ``files`` gives them; default: all.
      description: shows progress under this title.

    Raises:
      FileNotFoundError: when one is not there.
      StorageError: when the bucket does not answer, or one was cut short.
    """

    def fetch(name: str) -> None:
        to = target / name
        to.parent.mkdir(parents=True, exist_ok=True)
        partial = to.with_name(f".{to.name}.partial")
        with _named(source / name):
            _fs().get_file(os.fspath(source / name), os.fspath(partial))
        partial.replace(to)

    target.mkdir(parents=True, exist_ok=True)
    with wrap_storage_errors(source):
        _each(fetch, files(source) if names is None else names, description)


def upload(source: Path, target: Location, names: Iterable[str] | None = None, description: str = "") -> None:
    """Copy files from below a directory to below one in a bucket, several at once; arguments and errors as above."""
    with wrap_storage_errors(target):
        _each(
            lambda name: _fs().put_file(os.fspath(source / name), os.fspath(target / name), chunksize=_PIECE),
            files(source) if names is None else names,
            description,
        )


def remove(path: Location) -> None:
    """Remove a directory in a bucket, with all that is below; nothing where there is none."""
    with wrap_storage_errors(path), contextlib.suppress(FileNotFoundError):
        _fs().rm(os.fspath(path), recursive=True)


@contextlib.contextmanager
def _named(path: Location) -> Iterator[None]:
    """A missing object is told by the name that a user knows, not by the request's."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path)) from error


def _each(work: Callable[[str], None], names: Iterable[str], description: str) -> None:
    from phivision_jax.io.progress import bar

    names = list(names)
    with bar(description, len(names), shown=bool(description)) as advance, ThreadPoolExecutor(_AT_ONCE) as pool:
        for _ in pool.map(work, names):
            advance(1)
