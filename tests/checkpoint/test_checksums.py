"""Checksums of arrays: against plain Python, on any sharding, and what they are sure to notice."""

import itertools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from phivision_jax import sharding
from phivision_jax.checkpoint import checksums as module
from phivision_jax.checkpoint.checksums import checksums, flat_index, host_checksum

DTYPES = [np.float32, ml_dtypes.bfloat16, np.float16, np.int32, np.uint32, np.uint8, np.bool_]


def mix(x: int) -> int:
    """MurmurHash3's finalizer, in integers."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
    x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
    return x ^ (x >> 16)


def term(word: int, flat: int) -> int:
    return mix(word ^ mix(flat % 2**32 ^ mix(flat >> 32)))


def reference(array: np.ndarray) -> int:
    words = array.reshape(-1).view(f"uint{8 * array.itemsize}").tolist()
    return sum(term(word, i) for i, word in enumerate(words)) % 2**32


def one(array) -> int:
    return checksums({"x": array})["x"]


def random_array(shape, dtype, seed=0) -> np.ndarray:
    bits = np.random.default_rng(seed).integers(0, 256, (*shape, np.dtype(dtype).itemsize), np.uint8)
    return bits[..., 0] > 127 if dtype == np.bool_ else bits.view(dtype).reshape(shape)


def test_mix_is_known():
    """Two values that MurmurHash3's finalizer is known by: of 0, and of 1."""
    assert mix(0) == 0 and mix(1) == 0x514E28B7
    assert one(np.zeros(1, np.float32)) == 0 and one(np.array([1], np.int32)) == 0x514E28B7


@pytest.mark.parametrize("dtype", DTYPES)
@hypothesis.settings(max_examples=10)
@hypothesis.given(shape=st.lists(st.integers(0, 5), max_size=4).map(tuple), seed=st.integers(0, 99))
def test_device_and_host_give_what_plain_python_gives(dtype, shape, seed):
    array = random_array(shape, dtype, seed)
    assert one(jnp.asarray(array)) == host_checksum(array) == reference(array)


def test_a_tree_has_its_arrays_by_path():
    tree = {"a": {"b": np.ones(2, np.float32)}, "c": (np.ones(3, np.float32), np.float32(1))}
    assert checksums(tree).keys() == {"a/b", "c/0", "c/1"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_single_bit_counts(dtype):
    array = random_array((3, 4), dtype)
    before, bits = one(array), 8 * array.itemsize
    for i, bit in itertools.product(range(array.size), [0] if dtype == np.bool_ else range(bits)):
        flipped = array.copy()
        flipped.reshape(-1).view(f"uint{bits}")[i] ^= 1 << bit
        assert one(flipped) != before


def test_what_a_linear_sum_never_sees():
    """Two sign bits flipped; +x swapped with -x; and ordinary swaps, rows, shifts."""
    x = random_array((8, 8), np.float32)
    before = one(x)
    for i, j in itertools.combinations(range(8), 2):
        signs, swapped, opposite = x.copy(), x.copy(), x.copy()
        signs[[i, j], [i, j]] *= -1
        swapped[[i, j]] = x[[j, i]]
        assert before not in (one(signs), one(swapped))
        opposite[0, i], opposite[0, j] = 1.0, -1.0
        other = opposite.copy()
        other[0, i], other[0, j] = -1.0, 1.0
        assert one(opposite) != one(other)
    assert one(np.roll(x, 1)) != before != one(x.T.copy())
    assert one(np.float32([0.0])) != one(np.float32([-0.0]))


@pytest.mark.parametrize("spec", [(None, "fsdp"), ("fsdp", "tensor"), (("fsdp", "tensor"), None), ()])
def test_the_same_on_every_sharding_and_nothing_is_gathered(spec):
    x = random_array((16, 24), np.float32)
    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
    placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    assert one(placed) == reference(x)
    program = module._device_sum.lower(placed).compile().as_text()
    assert not any(word in program for word in ("all-gather", "all-to-all", "collective-permute"))
    assert spec == () or "all-reduce" in program


@pytest.mark.parametrize(
    "shape",
    [(5, 2**31), (40, 5120, 17920), (3, 2**32 - 1), (1_000_003, 999_983), (2**31, 3, 5), (4, 2**32 - 1, 2)],
)
def test_positions_beyond_32_bits(shape):
    rng = np.random.default_rng(0)
    corners = [[0, size - 1, *rng.integers(0, size, 3).tolist()] for size in shape]
    for at in itertools.product(*corners):
        high, low = flat_index([jnp.full((), i, jnp.uint32) for i in at], shape)
        want = sum(i * math.prod(shape[axis + 1 :]) for axis, i in enumerate(at))
        assert (int(high) << 32) + int(low) == want
        assert host_checksum(np.full((1,) * len(at), 7, np.int32), at, shape) == term(7, want)


def test_blocks_of_an_array_add_up(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 7)
    x = random_array((4, 6, 10), np.float32)
    cuts = [(slice(a, a + 2), slice(b, b + 3), slice(c, c + 5)) for a in (0, 2) for b in (0, 3) for c in (0, 5)]
    parts = [host_checksum(x[cut], [s.start for s in cut], x.shape) for cut in cuts]
    assert sum(parts) % 2**32 == host_checksum(x) == one(x)


def test_elements_of_64_bits_are_refused():
    with pytest.raises(ValueError, match="b/c is float64"):
        checksums({"b": {"c": np.zeros(3)}})
