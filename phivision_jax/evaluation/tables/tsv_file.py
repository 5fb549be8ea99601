"""A table of VLMEvalKit: tab-separated, with a header, images in base64, values quoted as pandas does.

The column ``image`` has an image, a Python list of images, or the ``index`` of another row, whose image it is; rows
without one are left out, as VLMEvalKit leaves them out. A table without this column has paths instead. Opening it reads
the file once, in records, and keeps the texts and where each record begins.
"""

import base64
import binascii
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from phivision_jax.evaluation.tables.row import LARGEST_TEXT, Row, python_list
from phivision_jax.io.messages import shorten

LARGEST = 256 * 2**20
"""Bytes of a record."""
REFERENCE = 64
"""Characters: a shorter value of the column ``image`` is the index of another row."""
_QUOTED = re.compile(rb'"([^"]*(?:""[^"]*)*)"(?=\t|\r?\n|\Z)')
_PLAIN = re.compile(rb"[^\t\n]*")
_IMAGES = re.compile(rb"""['"]([^'"]*)['"]""")


class TsvFile:
    """Rows of one file."""

    def __init__(self, path: Path, folder: Path) -> None:
        """Read the header.

        Raises:
          ValueError: for a file that has none.
        """
        self.path, self.folder = path, folder
        with path.open("rb") as file:
            _, header = next(_records(file, path), (0, []))
        self._names = [self._decode(name.removeprefix(b"\xef\xbb\xbf"), 0, "header") for name in header]
        if not self._names[1:] or len(set(self._names)) < len(self._names):
            raise ValueError(f"{path} has no header of different names, separated by tabs")
        self._offsets: dict[str, int] = {}
        """Beginnings of records in the file, by index."""

    def __iter__(self) -> Iterator[Row]:
        with self.path.open("rb") as file:
            records = _records(file, self.path)
            next(records)
            for number, (offset, fields) in enumerate(records, 1):
                if len(fields) != len(self._names):
                    expected = f"{len(fields)} values, but the header has {len(self._names)} names"
                    raise ValueError(f"{self.path}, row {number}: {expected}")
                cells = dict(zip(self._names, fields, strict=True))
                has_image = bool(cells.pop("image", b"no such column"))
                values = {name: self._decode(cell, number, name) for name, cell in cells.items()}
                index = values.get("index", str(number))
                if self._offsets.setdefault(index, offset) != offset:
                    raise ValueError(f"{self.path}, row {number}: column 'index' has {shorten(index)} again")
                if has_image:
                    yield Row(self.path, number, values, partial(self._load, index), self.folder)

    def _load(self, index: str, columns: Sequence[str]) -> Sequence[Any]:
        if "image" in self._names:
            value = self._cell(index, "image")
            if len(value) <= REFERENCE:
                other = self._decode(value, index, "image").strip()
                if other not in self._offsets:
                    raise ValueError(f"column 'image' is {shorten(other)}, which is no image and no index of a row")
                value = self._cell(other, "image")
            found = _IMAGES.findall(value) if value.startswith(b"[") else [value]
            return [_decoded(image) for image in found]
        paths = (self._decode(self._cell(index, name), index, name) for name in columns if name in self._names)
        return [path for value in paths if value for path in python_list(value) or [value]]

    def _cell(self, index: str, name: str) -> bytes:
        offset = self._offsets[index]
        with self.path.open("rb") as file:
            file.seek(offset)
            _, fields = next(_records(file, self.path), (0, []))
        if len(fields) != len(self._names):
            raise ValueError("the file has changed while it was read")
        return fields[self._names.index(name)]

    def _decode(self, cell: bytes, row: int | str, name: str) -> str:
        try:
            if len(cell) > 4 * LARGEST_TEXT:
                raise ValueError(f"has {len(cell):,} bytes, too many for a text")
            return cell.decode()
        except ValueError as error:
            raise ValueError(f"{self.path}, row {row}: column {shorten(name)!r}: {error}") from None


def _decoded(image: bytes) -> bytes:
    try:
        return base64.b64decode(b"".join(image.split()), validate=True)
    except binascii.Error as error:
        raise ValueError(f"column 'image' is not base64: {error}") from None


def _records(file: BinaryIO, path: Path) -> Iterator[tuple[int, list[bytes]]]:
    """Offset and fields of each record from here on."""
    offset = file.tell()
    while line := file.readline(LARGEST + 1):
        record, fields, start = bytearray(line), list[bytes](), 0
        while True:
            if len(record) > LARGEST:
                raise ValueError(f"{path} has a record of more than {LARGEST:,} bytes, from byte {offset:,} on")
            if record[start : start + 1] == b'"':
                field = _QUOTED.match(record, start)
                if field is None:
                    _to_closing_quote(file, path, record, offset)
                    continue
                fields.append(field[1].replace(b'""', b'"'))
            else:
                field = _PLAIN.match(record, start)
                assert field is not None  # it matches nothing
                is_last = record[field.end() : field.end() + 1] != b"\t"
                fields.append(field[0].removesuffix(b"\r") if is_last else field[0])
            start = field.end() + 1
            if record[field.end() : start] != b"\t":
                break
        yield offset, fields
        offset += len(record)


def _to_closing_quote(file: BinaryIO, path: Path, record: bytearray, offset: int) -> None:
    """Extend a record by the lines of a value that is not complete, to one with an odd number of quotes."""
    while len(record) <= LARGEST:
        line = file.readline(LARGEST + 1)
        record += line
        if not line:
            raise ValueError(f"{path} has a value in quotes that has no end, from byte {offset:,} on")
        if line.count(b'"') % 2:
            return
