"""JSON: an array in a file, or one object per line, whatever the file's name; a file or a folder.

Opening a file counts its items and notes where every 256th begins, so that any range can be read later without the
items before it. Nothing else is kept: an array of gigabytes is read through windows of a few megabytes.

Each line that cannot be read is quarantined by itself. An array is one document: if its syntax is broken anywhere,
opening it fails with the position, because it is not certain where the next item begins. In both, an item that is too
large or too deep, or has broken UTF-8, affects no other.
"""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from phivision_jax.data.quarantine import Quarantined
from phivision_jax.data.sources.files import FileSource
from phivision_jax.data.sources.items import LARGE
from phivision_jax.data.sources.source import Read
from phivision_jax.io.memory import limited_memory
from phivision_jax.io.messages import shorten
from phivision_jax.io.progress import bar

LARGEST = 64 * 2**20
"""Bytes of the largest item."""
EVERY = 256
"""Items between two noted positions."""
_SHOW_BAR = 256 * 2**20
_BOM = b"\xef\xbb\xbf"
_SPACE = b" \t\n\r"
_BRACKETS = np.zeros(256, np.int32)
_BRACKETS[list(b"[{")], _BRACKETS[list(b"]}")] = 1, -1
# The first line of an object that continues on the next.
_OPEN_OBJECT = re.compile(rb'\{\s*("[^"]*"\s*:\s*[\[{]\s*)?')


class Piece(NamedTuple):
    """The bytes of one item."""

    offset: int
    raw: bytes
    line: int = 0
    """Line number; 0 in an array."""
    problem: str | None = None
    """Why the item is not even decoded."""


class _File:
    """One file: the number of items, and where every ``EVERY``-th begins."""

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0
        size = path.stat().st_size
        marks: list[tuple[int, int]] = []
        title = f"counting the items of {path.name} (MB)"
        with path.open("rb") as file, bar(title, size // 10**6, shown=size > _SHOW_BAR) as advance:
            self._is_array, offset = _begin(file, path)
            for piece in self.pieces(file, offset, LARGE):
                if self.count % EVERY == 0:
                    advance(piece.offset // 10**6 - (marks[-1][0] if marks else 0) // 10**6)
                    marks.append((piece.offset, piece.line))
                self.count += 1
        self.marks = np.array([*marks, (size, 0)], np.int64)  # offset and line

    def pieces(self, file: BinaryIO, offset: int, window: int, line: int = 1) -> Iterator[Piece]:
        """The items from ``offset`` on."""
        return elements(file, offset, window) if self._is_array else _lines(file, offset, line)


class JsonSource(FileSource[_File]):
    """Items of JSON files."""

    format = "json"

    def _open(self, file: Path) -> list[tuple[_File, int]]:
        opened = _File(file)
        return [(opened, opened.count)]

    def _read_part(self, part: _File, start: int, stop: int) -> Iterator[Read | Quarantined]:
        block = start // EVERY
        (offset, line), number = part.marks[block].tolist(), block * EVERY
        window = min(LARGE, int(part.marks[-(-stop // EVERY), 0]) - offset)
        with part.path.open("rb") as file:
            for piece in part.pieces(file, offset, window, line):
                if number >= start:
                    place = f"{part.path.name}:{number + 1}"
                    position = f"line {piece.line}" if piece.line else f"item {number + 1}, byte {piece.offset}"
                    yield self._reader.read_json(piece.raw, place, f"{part.path.name}, {position}", piece.problem)
                number += 1
                if number == stop:
                    return
        raise ValueError(f"{part.path} has changed while it was read: item {number + 1} is missing")


def _begin(file: BinaryIO, path: Path) -> tuple[bool, int]:
    """Decide between array and lines: whether it is an array, and the position of the first item.

    Raises:
      ValueError: for a file that is neither.
    """
    head = file.read(2**16)
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError(f"{path} is UTF-16: JSON is UTF-8; convert it (iconv -f UTF-16 -t UTF-8)")
    if head[:2] == b"\x1f\x8b":
        raise ValueError(f"{path} is compressed: unpack it first (gunzip)")
    offset = len(_BOM) if head.startswith(_BOM) else 0
    body = head[offset:].lstrip()
    if body[:1] == b"[":
        # Under a name for lines, a file that does not also end with a bracket has a bad item on its first line.
        file.seek(max(0, path.stat().st_size - 2**12))
        if path.suffix.lower() == ".json" or file.read().rstrip()[-1:] == b"]":
            return True, len(head) - len(body) + 1
    elif _OPEN_OBJECT.fullmatch(body.partition(b"\n")[0]):
        problem = "write an array, or one per line; for a list inside it, make a file of that list alone (jq .data)"
        raise ValueError(f"{path} is one object over several lines: {problem}")
    return False, offset


def _lines(file: BinaryIO, offset: int, line: int) -> Iterator[Piece]:
    file.seek(offset)
    while raw := file.readline(LARGEST + 1):
        problem, rest = None, raw
        while len(raw) > LARGEST and rest and not rest.endswith(b"\n"):
            problem = f"longer than {LARGEST} bytes: one object with all items inside? Make a file of their list alone"
            rest = file.readline(LARGE)
        if not raw.isspace():
            yield Piece(offset, raw.strip(), line, problem)
        offset, line = file.tell(), line + 1


def elements(file: BinaryIO, offset: int, window: int) -> Iterator[Piece]:
    """The elements of an array, from any of them on.

    Quotes and brackets alone decide where an element ends, so one that cannot be decoded affects no other.

    Args:
      file: a file with one array.
      offset: after the opening bracket, or of an element.
      window: bytes to read at once, at least 1.

    Raises:
      ValueError: where the array is not JSON.
    """
    file.seek(offset)
    # ``raw`` is the element that begins at byte ``start``, as far as it has been read and is kept.
    raw, start, depth, quotes, is_first = b"", offset, 0, 0, True
    while block := file.read(window):
        if (len(block) - len(block.rstrip(b"\\"))) % 2:  # the escaped character is beyond the window
            block += file.read(1)
        text = np.frombuffer(block.replace(b"\\\\", b"  ").replace(b'\\"', b"  "), np.uint8)
        counts = quotes + np.cumsum(text == ord('"'), dtype=np.int32)
        outside = counts % 2 == 0
        depths = depth + np.cumsum(_BRACKETS[text] * outside, dtype=np.int32)
        ends = np.flatnonzero(outside & ((depths < 0) | (depths == 0) & (text == ord(","))))
        begin, depth, quotes = 0, int(depths[-1]), int(counts[-1]) % 2
        for end in [*ends.tolist(), len(block)]:
            part = block[begin:end] if raw else block[begin:end].lstrip(_SPACE)
            start = start if raw else offset + end - len(part)
            raw += part[: LARGEST + 1 - len(raw)]
            if end == len(block):
                break
            closing = block[end : end + 1]
            if raw or not is_first or closing != b"]":
                yield _decoded(file, raw.rstrip(_SPACE), start, offset + end - start)
            if closing == b"]":
                if block[end + 1 :].strip(_SPACE) or file.read(LARGE).strip(_SPACE):
                    raise ValueError(f"{file.name} has text after the end of the array, at byte {offset + end + 1}")
                return
            if closing != b",":
                raise _broken(file, start, "neither a comma nor ] after an element")
            raw, begin, is_first = b"", end + 1, False
        offset += len(block)
    if raw and not _decoded(file, raw, start, offset - start).problem:
        raise _broken(file, start, "neither a comma nor ] after an element")
    raise _broken(file, start, "it has no closing bracket")


def _decoded(file: BinaryIO, raw: bytes, start: int, length: int) -> Piece:
    """An element of ``length`` bytes; decoded as Latin-1, as JSON's structure has no byte above 127."""
    if length > LARGEST:
        return Piece(start, raw[:LARGE], problem=f"longer than {LARGEST} bytes")
    try:
        with limited_memory() if length > LARGE else contextlib.nullcontext():
            json.loads(raw.decode("latin-1"))
    except json.JSONDecodeError as error:
        extra = error.msg == "Extra data"
        raise _broken(file, start, "neither a comma nor ] after an element" if extra else error.msg) from None
    except (ValueError, RecursionError, MemoryError) as error:
        problem = f"beyond what can be decoded: {shorten(str(error)) or 'it takes too much memory'}"
        return Piece(start, raw[:LARGE], problem=problem)
    return Piece(start, raw)


def _broken(file: BinaryIO, start: int, problem: str) -> ValueError:
    return ValueError(
        f"{file.name} is not a JSON array: {problem}, in the element that begins at byte {start:,}; "
        "repair it, or write one object per line, of which each bad one is quarantined"
    )
