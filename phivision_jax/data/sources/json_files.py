"""JSON: an array in a file, or one object per line, whatever the file's name; a file, a folder or several files.

A first pass counts the items and notes where every 256th begins, so that any range can be read later without what
stands before it. Nothing else is kept: an array of gigabytes passes through windows of 64 MiB. Items are cut out first
and decoded afterwards, so broken UTF-8 or broken syntax costs the item in which it stands and no other; where an
array's commas and brackets no longer say where items begin, everything up to the next object that looks like an item
counts as one broken item.

The window is read as Latin-1 to find where an item ends: no byte above 127 means anything to JSON's structure, and a
character is a byte, so positions in the text are positions in the file.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from phivision_jax.data.quarantine import Quarantined
from phivision_jax.data.sources.conversations import FORMS
from phivision_jax.data.sources.files import Files, files_of_split, identify
from phivision_jax.data.sources.item_options import ItemOptions
from phivision_jax.data.sources.items import ItemReader
from phivision_jax.data.sources.source import Read
from phivision_jax.io.progress import bar

WINDOW = 64 * 2**20
"""Bytes read at once, and the most that one item may have."""
EVERY = 256
"""Items between two noted positions."""
_SHOW_BAR = 256 * 2**20
_BOM = b"\xef\xbb\xbf"
_SPACE = re.compile(r"[ \t\n\r]*")
_BETWEEN = re.compile(r",[ \t\n\r]*(?=\{)")
_PEEK = 2**16  # Bytes of broken text in which an id is looked for.


# The first line of an object that goes on.
_OPEN_OBJECT = re.compile(rb'\{\s*("[^"]*"\s*:\s*[\[{]\s*)?')


class Piece(NamedTuple):
    """The bytes of one item."""

    offset: int
    raw: bytes
    problem: str | None = None
    """Why these bytes are no item."""


class JsonSource:
    """Items of JSON files."""

    def __init__(
        self, path: Path | Iterable[Path], options: ItemOptions, *, split: str = "train", name: str | None = None
    ) -> None:
        """Find and count the items.

        Args:
          path: a file; a folder, of which ``split`` chooses the files; or several files.
          options: how items become records.
          split: of a folder's files, see ``files_of_split``.
          name: of the source; default: the stem of the file or the name of the folder.

        Raises:
          ValueError: when there is no item, or a file is neither of the two kinds.
        """
        paths = [path] if isinstance(path, Path) else list(path)
        self.name = name or (paths[0].stem if paths[0].is_file() else paths[0].resolve().name)
        self._options = options
        forms = (*FORMS, *(theirs for theirs, ours in options.renames.items() if ours in FORMS))
        found = [files_of_split(p, "json", split) for p in paths]
        self.files = Files(*([file for one in found for file in one[part]] for part in (0, 1)))
        self._files = [_File(file, forms) for file in self.files.read]
        self._begins = np.cumsum([0, *(file.count for file in self._files)])
        self._key = identify([file.path for file in self._files])
        if not len(self):
            raise ValueError(f"{', '.join(map(str, paths))} holds no items")

    def __len__(self) -> int:
        return int(self._begins[-1])

    def key(self) -> Any:
        return {"format": "json", "name": self.name, "files": self._key, "options": self._options.key()}

    def read(self, start: int, stop: int) -> Iterator[Read | Quarantined]:
        for file, begin in zip(self._files, self._begins, strict=False):
            first, last = max(start - begin, 0), min(stop - begin, file.count)
            if first < last:
                reader = ItemReader(self.name, file.path.parent, self._options)
                yield from file.read(int(first), int(last), reader)


class _File:
    """One file: how many items, and where every ``EVERY``-th begins."""

    def __init__(self, path: Path, forms: tuple[str, ...]) -> None:
        self.path, self._forms = path, forms
        size = path.stat().st_size
        with path.open("rb") as file:
            begin = file.read(3)
            if begin[:2] in (b"\xff\xfe", b"\xfe\xff"):
                raise ValueError(f"{path} is UTF-16: JSON is UTF-8; convert it (iconv -f UTF-16 -t UTF-8)")
            offset = 3 if begin == _BOM else 0
            if begin[:2] == b"\x1f\x8b":
                raise ValueError(f"{path} is compressed: unpack it first (gunzip)")
            file.seek(offset)
            head = file.read(2**16)
            body = head.lstrip()
            self.is_array = body[:1] == b"[" and (path.suffix.lower() == ".json" or _ends_as_array(file, size))
            if self.is_array:
                offset += len(head) - len(body) + 1
            elif _OPEN_OBJECT.fullmatch(body.partition(b"\n")[0]):
                raise ValueError(
                    f"{path} is one object over several lines: it must be an array of them, or one per line; if the "
                    "items are a list inside it, make a file of that list alone (jq .data)"
                )
            offsets: list[int] = []
            lines: list[int] = []
            self.count = 0
            with bar(f"counting the items of {path.name} (MB)", size // 10**6, shown=size > _SHOW_BAR) as advance:
                for line, piece in self._pieces(file, offset, WINDOW):
                    if self.count % EVERY == 0:
                        advance(piece.offset // 10**6 - (offsets[-1] if offsets else 0) // 10**6)
                        offsets.append(piece.offset)
                        lines.append(line)
                    self.count += 1
        self._offsets = np.array([*offsets, size], np.int64)
        self._lines = np.array(lines, np.int64)

    def read(self, start: int, stop: int, reader: ItemReader) -> Iterator[Read | Quarantined]:
        block = start // EVERY
        offset = int(self._offsets[block])
        number = block * EVERY
        window = min(WINDOW, int(self._offsets[-(-stop // EVERY)]) - offset)
        with self.path.open("rb") as file:
            for line, piece in self._pieces(file, offset, window, int(self._lines[block])):
                if number >= start:
                    yield self._result(piece, number, line, reader)
                number += 1
                if number == stop:
                    return
        raise ValueError(f"{self.path} has changed while it was read: item {number + 1} is gone")

    def _pieces(self, file: BinaryIO, offset: int, window: int, line: int = 1) -> Iterator[tuple[int, Piece]]:
        """Line number (0 in an array) and bytes of each item from ``offset`` on."""
        if self.is_array:
            return ((0, piece) for piece in elements(file, offset, window, self._forms))
        return _lines(file, offset, line)

    def _result(self, piece: Piece, number: int, line: int, reader: ItemReader) -> Read | Quarantined:
        place = f"{self.path.name}:{number + 1}"
        where = f"{self.path.name}, " + (f"line {line}" if line else f"item {number + 1}, byte {piece.offset}")

        def bad(reason: str, detail: str) -> Quarantined:
            return reader.bad(reason, detail, place, where, _guess_id(piece.raw, reader.id_fields()))

        if piece.problem:
            return bad("syntax", piece.problem)
        try:
            item = json.loads(piece.raw.decode())
        except UnicodeDecodeError as error:
            return bad("encoding", f"not UTF-8: {error.reason} at byte {piece.offset + error.start} of the file")
        except json.JSONDecodeError as error:
            return bad("syntax", f"not JSON: {error.msg} at character {error.pos + 1} of the item")
        except RecursionError:
            return bad("syntax", "too many brackets inside each other")
        except ValueError:
            return bad("syntax", "a number of thousands of digits")
        return reader.read(item, place, where)


def _ends_as_array(file: BinaryIO, size: int) -> bool:
    """Whether a file that begins with a bracket ends with one; else that is a bad item on the first of its lines."""
    file.seek(max(0, size - 2**12))
    return file.read().rstrip()[-1:] == b"]"


def _guess_id(raw: bytes, names: Iterable[str]) -> Any:
    """An item whose id is what can still be read of it."""
    with contextlib.suppress(ValueError, RecursionError):  # Often only its UTF-8 is broken.
        if isinstance(item := json.loads(raw.decode("utf-8", "replace")), dict):
            return item
    text = raw[:_PEEK].decode("utf-8", "replace")
    found = re.search(rf'"({"|".join(map(re.escape, names))})"\s*:\s*("(?:[^"\\]|\\.)*"|-?\d+)', text)
    with contextlib.suppress(ValueError):
        return {found[1]: json.loads(found[2])} if found else {}
    return {}


def _lines(file: BinaryIO, offset: int, line: int) -> Iterator[tuple[int, Piece]]:
    file.seek(offset)
    while raw := file.readline(WINDOW + 1):
        length = len(raw)
        problem = None
        if length > WINDOW and not raw.endswith(b"\n"):
            problem = f"longer than {WINDOW} bytes: one object with all items inside? Make a file of their list alone"
            while (rest := file.readline(WINDOW)) and not rest.endswith(b"\n"):
                length += len(rest)
            length += len(rest)
        if not raw.isspace():
            yield line, Piece(offset, raw.strip(), problem)
        offset += length
        line += 1


# ---------------------------------------------------------------------------------------------------------------------
# Arrays.


def elements(file: BinaryIO, offset: int, window: int, forms: tuple[str, ...] = FORMS) -> Iterator[Piece]:
    """The elements of an array from the one at ``offset`` on, whatever the window they are read through.

    Args:
      file: of one array.
      offset: behind its bracket, or where an earlier pass saw an element.
      window: bytes to read at once, at least 1.
      forms: fields by which an object looks like an item.
    """
    text = _Text(file, offset, window)
    while True:
        text.skip_space()
        if text.at_end():
            yield Piece(text.offset, b"", "the file ends inside the array: it has no ]")
            return
        # Reading may begin again at any piece, so what a piece is must not depend on the one before it.
        begin = text.offset
        if text.next_is("]"):
            text.advance(1)
            text.skip_space()
            if not text.at_end():
                yield Piece(begin, text.take_rest(), "text after the end of the array")
            return
        length, problem, value = text.value()
        raw = b""
        if not problem:
            raw = text.take(length)
            text.skip_space()
            if text.next_is(","):
                yield Piece(begin, raw)
                text.advance(1)
                continue
            # An object behind which something else follows is whole all the same.
            if isinstance(value, dict) or text.at_end() or text.next_is("]"):
                yield Piece(begin, raw)
                continue
            # The name of a field, likely, whose object has lost its bracket.
            problem = "neither a comma nor the end of the array behind a value"
        yield Piece(begin, text.take_until_item(forms, raw), problem)
        if text.at_end():
            return


class _Text:
    """A place in a file, and a window of Latin-1 text from there on, which grows as needed."""

    def __init__(self, file: BinaryIO, offset: int, window: int) -> None:
        file.seek(offset)
        self._file, self._window = file, max(window, 1)
        self._text, self._at, self._ended = "", 0, False
        self._base = offset  # of the text's first character
        self._decode = json.JSONDecoder().raw_decode

    @property
    def offset(self) -> int:
        return self._base + self._at

    def _grow(self) -> bool:
        """Read another window, and forget what lies behind; False at the end of the file."""
        read = self._file.read(self._window)
        self._ended = not read
        self._text = self._text[self._at :] + read.decode("latin-1")
        self._base += self._at
        self._at = 0
        return bool(read)

    def at_end(self) -> bool:
        return self._at == len(self._text) and not self._grow()

    def next_is(self, character: str) -> bool:
        return not self.at_end() and self._text[self._at] == character

    def advance(self, count: int) -> None:
        self._at += count

    def take(self, count: int) -> bytes:
        self._at += count
        return self._text[self._at - count : self._at].encode("latin-1")

    def skip_space(self) -> None:
        while True:
            found = _SPACE.match(self._text, self._at)
            assert found is not None
            self._at = found.end()
            if self._at < len(self._text) or not self._grow():
                return

    def value(self) -> tuple[int, str | None, Any]:
        """Length of the JSON value that begins here, or else what is wrong with it; and the value."""
        while True:
            begin = self._at
            left = len(self._text) - begin
            try:
                value, end = self._decode(self._text, begin)
            except json.JSONDecodeError as error:
                # Cut off by the window? An escape, the longest word that is reported where it begins, has 6 characters,
                # "-Infinity" 9.
                cut = error.msg.startswith("Unterminated") or error.pos >= len(self._text) - 10
                problem = f"not JSON: {error.msg} at byte {self._base + error.pos} of the file"
                length, value = error.pos - begin, None
            except RecursionError:
                cut, problem, length, value = False, "too many brackets inside each other", 0, None
            except ValueError:
                cut, problem, length, value = False, "a number of thousands of digits", 0, None
            else:
                length, problem = end - begin, ""
                # 12 may be the beginning of 123, or of 12.5e+3, of which "12.5e+" would be read as 12.5.
                cut = end >= len(self._text) - 2 and self._text[end - 1] not in '"}]'
            # Whether an item is too long must not depend on the window either.
            if left > WINDOW and (cut or length > WINDOW):
                return 0, f"longer than {WINDOW} bytes", None
            if not cut or self._ended or not self._grow():
                return (0, problem, None) if problem else (length, None, value)

    def pass_by(self, count: int | None = None, passed: bytes = b"") -> bytes:
        """Go on, by default to the end of the window; ``passed`` and what is passed now, as much as may hold an id."""
        end = len(self._text) if count is None else self._at + count
        peek = self._text[self._at : min(end, self._at + _PEEK - len(passed))] if len(passed) < _PEEK else ""
        self._at = end
        return passed + peek.encode("latin-1")

    def take_rest(self) -> bytes:
        """Go to the end of the file."""
        passed = b""
        while not self.at_end():
            passed = self.pass_by(None, passed)
        return passed

    def take_until_item(self, forms: Iterable[str], passed: bytes) -> bytes:
        """Go on to the next object behind a comma that looks like an item, or to the end of the file."""
        while True:
            if found := _BETWEEN.search(self._text, self._at):
                passed = self.pass_by(found.end() - self._at, passed)
                if self.item_begins(forms):
                    return passed
                continue
            # What ends the window may be the beginning of what is looked for.
            comma = self._text.rfind(",", self._at)
            cut = comma >= 0 and not self._text[comma + 1 :].strip(" \t\n\r")
            passed = self.pass_by(comma - self._at if cut else None, passed)
            if not self._grow():
                return self.pass_by(None, passed)

    def item_begins(self, forms: Iterable[str]) -> bool:
        """Whether what begins here is an object with one of these keys."""
        _, _, value = self.value()
        return isinstance(value, dict) and any(form in value for form in forms)
