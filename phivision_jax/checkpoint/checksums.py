"""A checksum of an array that is the same on any mesh, and can be computed block by block.

A flipped bit in a stored array would otherwise be restored silently. The checksum is computed on the devices before
anything is copied or written, and computed again on another mesh, another number of hosts, or from blocks with NumPy.
Hence plain sums of uint32, whose order does not matter, over the bit patterns of elements, zero-extended to uint32:

    row(r) = Σ word(r, c) over c        checksum = Σ mix(row(r) ^ mix(r ^ ROW)) over r,
    column(c) = Σ word(r, c) over r                Σ mix(column(c) ^ mix(c)) over c          all mod 2³²

c is an element's index along the last axis, and r the row-major flat index along the others. ``mix`` is a bijection of
uint32: the finalizer of MurmurHash3 (A. Appleby, public domain), in which each of the five operations, an xor with the
own right shift or a product with an odd number, can be undone.

Every change within one element is detected, hence every flipped bit: it changes a row's sum and a column's sum, hence
one term of either half. Elements, rows, columns or blocks that were exchanged change several terms, and are missed once
in 2³². A change is missed for certain only if it cancels out in every row and in every column, such as four flipped
sign bits at the corners of a rectangle. Sums of rows and columns are as fast as memory; a term for every element would
detect these too, but take NumPy ten times as long.

This module is NumPy; ``arrays.py`` computes the same on devices.
"""

import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from phivision_jax.checkpoint.layout import Array

ROW = 0x9E3779B9
"""Keeps the keys of rows apart from those of columns, so that transposing an array changes its checksum."""
_TILE = 1 << 17
"""Elements that are summed at a time: they stay in the processor's cache."""


def mix(x: Any) -> Any:
    """MurmurHash3's finalizer of a uint32 array, NumPy's or JAX's."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def rows_and_columns(shape: Sequence[int]) -> tuple[int, int]:
    """The two dimensions in which the checksum sees an array: all axes but the last, and the last.

    Raises:
      ValueError: when one of them has more than 2³² indices.
    """
    rows, columns = math.prod(shape[:-1]), math.prod(shape[-1:])
    if max(rows, columns) > 2**32:
        raise ValueError(f"an array of shape {tuple(shape)} is too large for a checksum: over 2^32 rows or columns")
    return rows, columns


class StreamedChecksums:
    """Checksums of arrays that pass by in blocks, in any order and from any thread.

    Until an array is complete, the sums of its rows and columns are kept: 4 bytes each.
    """

    def __init__(self) -> None:
        self._unfinished: dict[str, tuple[np.ndarray, np.ndarray, int]] = {}
        self._lock = threading.Lock()

    def add(self, path: str, block: np.ndarray, region: Sequence[slice], shape: Sequence[int]) -> Array | None:
        """Add a block; return the array's metadata when this completes it. Each block must be added once.

        Args:
          region: place of the block in the array; axes that are not given are complete.
          shape: of the array.
        """
        block_rows, block_columns = _sums(block)
        start = [axis.start or 0 for axis in region] + [0] * (block.ndim - len(region))
        index = np.zeros(1, np.intp)  # of the block's rows
        for axis, size in enumerate(block.shape[:-1]):
            index = (index[:, None] * shape[axis] + np.arange(start[axis], start[axis] + size)).reshape(-1)
        first = start[-1] if block.ndim else 0
        with self._lock:
            if path not in self._unfinished:
                rows, columns = (np.zeros(size, np.uint32) for size in rows_and_columns(shape))
                self._unfinished[path] = rows, columns, math.prod(shape)
            rows, columns, left = self._unfinished.pop(path)
            rows[index] += block_rows
            columns[first : first + len(block_columns)] += block_columns
            if left := left - block.size:
                self._unfinished[path] = rows, columns, left
                return None
        return Array(block.dtype.name, tuple(shape), _finish(rows, columns))


def _sums(block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums of the rows and of the columns, in uint32."""
    shape = rows_and_columns(block.shape)
    words = np.ascontiguousarray(block).view(f"uint{8 * block.itemsize}").reshape(shape)
    rows, columns = (np.zeros(size, np.uint32) for size in shape)
    wide = min(shape[1], _TILE) or 1
    high = max(1, _TILE // wide)
    for i in range(0, shape[0], high):
        for j in range(0, shape[1], wide):
            tile = words[i : i + high, j : j + wide].astype(np.uint32, copy=False)
            rows[i : i + high] += np.add.reduce(tile, axis=1, dtype=np.uint32)
            columns[j : j + wide] += np.add.reduce(tile, axis=0, dtype=np.uint32)
    return rows, columns


def _finish(rows: np.ndarray, columns: np.ndarray) -> str:
    halves = []
    for sums, salt in ((rows, ROW), (columns, 0)):
        keys = mix(np.arange(len(sums), dtype=np.uint32) ^ np.uint32(salt))
        halves.append(int(mix(sums ^ keys).sum(dtype=np.uint32)))
    return "".join(f"{half:08x}" for half in halves)


def difference(saved: Mapping[str, Array], found: Mapping[str, Array]) -> str | None:
    """Name the first array that is not what was saved, for ``DamagedError``; None if there is none."""
    names = [name for name in sorted(saved.keys() | found.keys()) if saved.get(name) != found.get(name)]
    if not names:
        return None
    more = f", and {len(names) - 1} more," if len(names) > 1 else ""
    was, now = (arrays[names[0]].checksum if names[0] in arrays else "none" for arrays in (saved, found))
    return f"its array {names[0]}{more} does not hold what was saved (checksum {now}, saved as {was})"
