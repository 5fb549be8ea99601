"""Logs with one JSON object per line: append a line, drop the lines after a step, read what is complete.

A kill may leave a last line that is cut short, and a power cut NULs. Readers ignore both, and the next ``append``
removes them.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from phivision_jax.io import atomic
from phivision_jax.io.storage import Location, wrap_storage_errors


class Writer:
    """A log that is open for appending lines, for one process at a time; also a context manager.

    Args:
      path: created if need be; a last line that is cut short is removed.

    Raises:
      OSError: when it cannot be written; the error names the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with atomic.with_filename(path):
            self._file = path.open("a+b")
            if self._file.tell() and (self._file.seek(-1, 2), self._file.read(1))[1] != b"\n":
                self._file.seek(0)
                self._file.truncate(self._file.read().rfind(b"\n") + 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one line; when this returns, it survives the end of the process. Errors as the constructor."""
        line = json.dumps(row, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
        with atomic.with_filename(self._path):
            self._file.write(line)
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        with atomic.with_filename(self._path):
            self._file.close()


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Append one line to a log that is not kept open; as ``Writer.write``."""
    with Writer(path) as log:
        log.write(row)


def read(path: Location, **kinds: type) -> list[dict[str, Any]]:
    """The rows of a log; none when there is no such file. Lines that are no JSON objects, as a crash leaves them, are
    ignored, and so are rows without a value of each of these kinds: ``step=int, time=float``.
    """
    return [row for _, row in _lines(path, **kinds)]


def truncate(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop the lines whose "step" is greater than ``step``, and incomplete ones; return the rows that remain."""
    if not path.exists():
        return []
    kept = [(line, row) for line, row in _lines(path, step=int) if row["step"] <= step]
    atomic.write(path, b"".join(line for line, _ in kept))
    return [row for _, row in kept]


def is_a(value: Any, kind: type) -> bool:
    """True for a value of this kind: ``int`` is a number of something, ``float`` any number that one can count with."""
    if kind in (int, float):
        return type(value) in (int, kind) and (0 <= value < 2**53 if kind is int else abs(value) < 1e100)
    return isinstance(value, kind)


def _lines(path: Location, **kinds: type) -> list[tuple[bytes, dict[str, Any]]]:
    with wrap_storage_errors(path):
        content = path.read_bytes() if path.exists() else b""
    found = []
    for line in content.replace(b"\0", b"").splitlines(keepends=True):
        try:
            row = json.loads(line) if line.endswith(b"\n") else None
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and all(is_a(row.get(name), kind) for name, kind in kinds.items()):
            found.append((line, row))
    return found
