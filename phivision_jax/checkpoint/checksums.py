"""A checksum of an array that is the same on any mesh, and adds up over blocks.

A flipped bit in a stored array would otherwise be restored silently. The checksum is computed on the device before
anything is copied or written, and computed again on another mesh, another number of hosts, or block by block with
NumPy. Hence a plain sum, whose order does not matter, over a term per element:

    term(r, c) = mix(word(r, c) ^ mix(r ^ ROW) ^ mix(c))      checksum = Σ term(r, c) mod 2³²

word(r, c) is the bit pattern of an element, zero-extended to uint32; c is its index along the last axis, and r the
row-major flat index along the others. ``mix`` is a bijection of uint32: the finalizer of MurmurHash3 (A. Appleby,
public domain), in which each of the five operations, an xor with the own right shift or a product with an odd number,
can be undone.

Every change within one element is detected, hence every flipped bit: word ^ key differs, mix is a bijection, and one
changed term changes the sum. A change of several elements, such as a swap of two, is missed once in 2³². This is why
the position enters before mix. A linear sum Σ weight·word with odd weights also detects every single bit, but never
two flipped sign bits, nor +x swapped with −x: 2³¹ times the difference of two odd numbers is 0 mod 2³².

This module is NumPy; ``arrays.py`` computes the same on devices.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from phivision_jax.checkpoint.layout import Array

ROW = 0x9E3779B9
"""Keeps the keys of rows apart from those of columns, so that transposing an array changes its checksum."""
_TILE = 1 << 16
"""Elements that NumPy processes at a time: their words stay in the processor's cache."""


def mix(x: Any) -> Any:
    """MurmurHash3's finalizer of a uint32 array, NumPy's or JAX's."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def rows_and_columns(shape: Sequence[int], name: str = "array") -> tuple[int, int]:
    """The two dimensions in which the checksum sees an array: all axes but the last, and the last.

    Raises:
      ValueError: when one of them has more than 2³² indices.
    """
    rows, columns = math.prod(shape[:-1]), math.prod(shape[-1:])
    if max(rows, columns) > 2**32:
        raise ValueError(f"{name} of shape {tuple(shape)} is too large for a checksum: more than 2^32 rows or columns")
    return rows, columns


def block_checksum(block: np.ndarray, start: Sequence[int] = (), shape: Sequence[int] = ()) -> int:
    """The checksum of an array, or of a block of it: those of blocks add up, mod 2³², to the array's.

    Args:
      block: elements of at most 32 bits; needs a constant amount of memory besides.
      start: index of the block's first element in the array; axes that are not given start at 0.
      shape: of the array; default: the block's.
    """
    shape, start = tuple(shape) or block.shape, (*start, *[0] * (block.ndim - len(start)))
    rows_and_columns(shape)
    row = np.zeros(1, np.uint32)
    for axis, size in enumerate(block.shape[:-1]):
        stride = math.prod(shape[axis + 1 : -1])
        index = (np.arange(start[axis], start[axis] + size, dtype=np.uint64) * stride).astype(np.uint32)
        row = (row[:, None] + index).reshape(-1)
    first, count = (start[-1], block.shape[-1]) if block.ndim else (0, 1)
    row_keys = mix(row ^ np.uint32(ROW))
    column_keys = mix(np.arange(first, first + count, dtype=np.uint64).astype(np.uint32))
    words = np.ascontiguousarray(block).view(f"uint{8 * block.itemsize}").reshape(len(row), count)
    wide = min(count, _TILE) or 1
    high = max(1, _TILE // wide)
    total, (terms, shifted) = 0, np.empty((2, high, wide), np.uint32)
    for i in range(0, len(row), high):
        for j in range(0, count, wide):
            tile = words[i : i + high, j : j + wide]
            x, y = (buffer[: tile.shape[0], : tile.shape[1]] for buffer in (terms, shifted))
            np.bitwise_xor(row_keys[i : i + high, None], column_keys[j : j + wide], out=x)
            np.bitwise_xor(x, tile, out=x)
            for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):  # mix, without temporaries
                np.right_shift(x, shift, out=y)
                np.bitwise_xor(x, y, out=x)
                if factor != 1:
                    np.multiply(x, np.uint32(factor), out=x)
            total += int(x.sum(dtype=np.uint32))
    return total % 2**32


class StreamedChecksums:
    """Adds up the checksums of arrays that pass by in blocks, in any order and from any thread."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()

    def add(self, path: str, block: np.ndarray, start: Sequence[int], shape: Sequence[int]) -> Array | None:
        """Add a block; return the array's metadata when this completes it. Each block must be added once."""
        term = block_checksum(block, start, shape)
        with self._lock:
            total, left = self._sums.pop(path, (0, math.prod(shape)))
            total, left = (total + term) % 2**32, left - block.size
            if left:
                self._sums[path] = total, left
                return None
        return Array(block.dtype.name, tuple(shape), f"{total:08x}")


def difference(saved: Mapping[str, Array], found: Mapping[str, Array]) -> str | None:
    """Name the first array that is not what was saved, for ``DamagedError``; None if there is none."""
    names = [name for name in sorted(saved.keys() | found.keys()) if saved.get(name) != found.get(name)]
    if not names:
        return None
    more = f", and {len(names) - 1} more," if len(names) > 1 else ""
    was, now = (arrays[names[0]].checksum if names[0] in arrays else "none" for arrays in (saved, found))
    return f"its array {names[0]}{more} does not hold what was saved (checksum {now}, saved as {was})"
