"""A checksum of every array, computed where the array is and the same on any mesh.

Orbax restores a flipped bit in silence, so a checkpoint says itself what its arrays held. The number has to come from
the device before anything is copied or written, and to be found again on another mesh, another number of hosts, or by
NumPy. Hence a plain sum, whose order does not matter, over a term per element:

    term(i) = mix(word(i) ^ key(i))      key(i) = mix(low(i) ^ mix(high(i)))      checksum = Σ term(i) mod 2³²

word(i) is the bit pattern of element i, zero-extended to uint32, and (high, low) its flat row-major index in the whole
array as 64 bits. ``mix`` is a bijection of uint32: the finalizer of MurmurHash3 (A. Appleby, public domain), in which
each of the five operations, an xor with the own right shift or a product with an odd number, can be undone.

What it is sure to catch: any change within one element, hence any single flipped bit. word ^ key differs, so does the
term, because mix is a bijection, and it alone, so the sums differ by a number that is not 0 mod 2³².
What it misses once in 2³²: changes of several elements, such as two that were swapped. This is why the position enters
before mix. A linear sum Σ weight(i)·word(i) with odd weights is as sure of one bit, but it never sees two sign bits
flip, nor +x swapped with −x: 2³¹ times the difference of two odd numbers is 0 mod 2³².
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

CHUNK = 1 << 20
"""Elements that the host takes at a time: with their 64-bit indices, some 50 MB."""


def checksums(tree: Any) -> dict[str, int]:
    """The checksum of every leaf, by its path ("decoder/embed_tokens/embedding").

    Leaves are jax or numpy arrays of elements of at most 32 bits. Sharded ones are summed where they lie: what leaves a
    device is one uint32 per array. Returns when the numbers are here.

    Raises:
      ValueError: for 64-bit elements, naming the array.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    sums = {}
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if jnp.dtype(leaf.dtype).itemsize > 4:
            raise ValueError(f"{name} is {leaf.dtype}: checksums are for elements of at most 32 bits")
        sums[name] = _device_sum(leaf)
    return {name: int(value) for name, value in jax.device_get(sums).items()}


@jax.jit
def _device_sum(x: jax.Array) -> jax.Array:
    index = [jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) for axis in range(x.ndim)]
    high, low = flat_index(index, x.shape)
    return jnp.sum(_mix(_words(x) ^ _mix(low ^ _mix(high))), dtype=jnp.uint32)


def _words(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)


def _mix(x: Any) -> Any:
    """A bijection of uint32, on either kind of array."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def flat_index(index: Sequence[jax.Array], shape: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    """The row-major flat index of elements of an array, in 64 bits without 64-bit integers.

    Args:
      index: per axis, uint32 indices; they broadcast against one another.
      shape: of the whole array; every axis is shorter than 2³².

    Returns:
      (high, low) words, uint32.
    """
    # The trailing axes that together stay below 2³² are counted in one word; the leading ones, few, are multiplied
    # into two. Arrays of fewer elements than that have no leading axes and cost nothing more.
    cut = len(shape)
    while cut > 0 and math.prod(shape[cut - 1 :]) <= 2**32:
        cut -= 1
    inner = _one_word(index[cut:], shape[cut:])
    if cut == 0:
        return jnp.uint32(0), inner
    size = math.prod(shape[cut:])
    outer_high, outer_low = flat_index(index[:cut], shape[:cut])
    high, low = _product(outer_low, size)
    total = low + inner
    return outer_high * np.uint32(size % 2**32) + high + (total < low).astype(jnp.uint32), total


def _one_word(index: Sequence[jax.Array], shape: Sequence[int]) -> jax.Array:
    total = jnp.uint32(0)
    for axis, i in enumerate(index):
        total = total + i * np.uint32(math.prod(shape[axis + 1 :]) % 2**32)
    return total


def _product(a: jax.Array, b: int) -> tuple[jax.Array, jax.Array]:
    """The 64 bits of a · b, for uint32 a and 0 < b ≤ 2³², from products of 16-bit halves."""
    half, sixteen = np.uint32(0xFFFF), np.uint32(16)
    a0, a1, b0, b1 = a & half, a >> sixteen, np.uint32(b & 0xFFFF), np.uint32(b >> 16)
    middle = (a0 * b0 >> sixteen) + (a0 * b1 & half) + (a1 * b0 & half)
    high = a1 * b1 + (a0 * b1 >> sixteen) + (a1 * b0 >> sixteen) + (middle >> sixteen)
    return high, (middle << sixteen) | (a0 * b0 & half)


def host_checksum(block: np.ndarray, start: Sequence[int] = (), shape: Sequence[int] = ()) -> int:
    """What NumPy makes of an array, or of a block of one: the checksums of blocks add up, mod 2³², to the array's.

    Args:
      block: of at most 32 bits an element; memory use does not grow with it.
      start, shape: where its first element stands in the whole array, and that array's shape; default: it is the whole.
    """
    shape, start = tuple(shape) or block.shape, tuple(start) or (0,) * block.ndim
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    words = np.ascontiguousarray(block).reshape(-1).view(f"uint{8 * block.itemsize}")
    total = 0
    for begin in range(0, words.size, CHUNK):
        part = words[begin : begin + CHUNK].astype(np.uint32)
        flat = np.arange(begin, begin + part.size, dtype=np.uint64)
        if block.shape != shape:
            inside = np.unravel_index(flat.astype(np.int64), block.shape)
            flat = np.zeros(part.size, np.uint64)
            for i, offset, stride in zip(inside, start, strides, strict=True):
                flat += (i + offset).astype(np.uint64) * np.uint64(stride)
        high, low = (flat >> np.uint64(32)).astype(np.uint32), flat.astype(np.uint32)
        total += int(_mix(part ^ _mix(low ^ _mix(high))).sum(dtype=np.uint32))
    return total % 2**32


def differing(saved: Mapping[str, str], found: Mapping[str, str]) -> str | None:
    """Half a sentence naming the first array that is not what was saved; None: all are."""
    names = [name for name in sorted(saved.keys() | found.keys()) if saved.get(name) != found.get(name)]
    if not names:
        return None
    more = f", and {len(names) - 1} more," if len(names) > 1 else ""
    was, now = saved.get(names[0], "none"), found.get(names[0], "none")
    return f"its array {names[0]}{more} does not hold what was saved (checksum {now}, saved as {was})"
