"""Array checksums: against plain Python, on any sharding, block by block, and what they detect."""

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
from phivision_jax.checkpoint import arrays, checksums
from phivision_jax.checkpoint.checksums import StreamedChecksums, block_checksum, difference
from phivision_jax.checkpoint.layout import Array

DTYPES = [np.float32, ml_dtypes.bfloat16, np.float16, np.int32, np.uint32, np.uint8, np.bool_]


def mix(x: int) -> int:
    """MurmurHash3's finalizer, in integers."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
    x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
    return x ^ (x >> 16)


def term(word: int, row: int, column: int) -> int:
    return mix(word ^ mix(row ^ 0x9E3779B9) ^ mix(column))


def reference(array: np.ndarray) -> int:
    words = array.reshape(-1).view(f"uint{8 * array.itemsize}").tolist()
    columns = array.shape[-1] if array.ndim else 1
    return sum(term(word, *divmod(i, columns)) for i, word in enumerate(words)) % 2**32


def device_checksum(array) -> int:
    return int(arrays.describe({"x": array})["x"].checksum, 16)


def random_array(shape, dtype, seed=0) -> np.ndarray:
    bits = np.random.default_rng(seed).integers(0, 256, (*shape, np.dtype(dtype).itemsize), np.uint8)
    return bits[..., 0] > 127 if dtype == np.bool_ else bits.view(dtype).reshape(shape)


def test_mix_matches_known_values():
    """The values of MurmurHash3's finalizer at 0 and 1."""
    assert checksums.mix(np.arange(2, dtype=np.uint32)).tolist() == [mix(0), mix(1)] == [0, 0x514E28B7]


@pytest.mark.parametrize("dtype", DTYPES)
@hypothesis.settings(max_examples=10)
@hypothesis.given(shape=st.lists(st.integers(0, 5), max_size=4).map(tuple), seed=st.integers(0, 99))
def test_device_and_numpy_match_plain_python(dtype, shape, seed):
    array = random_array(shape, dtype, seed)
    assert device_checksum(jnp.asarray(array)) == block_checksum(array) == reference(array)


def test_describe_names_arrays_by_path():
    tree = {"a": {"b": np.ones(2, np.float32)}, "c": (np.ones(3, ml_dtypes.bfloat16), np.float32(1))}
    found = arrays.describe(tree)
    assert found.keys() == {"a/b", "c/0", "c/1"}
    assert found["c/0"][:2] == ("bfloat16", (3,)) and found["c/1"].shape == ()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_single_bit_changes_the_checksum(dtype):
    array = random_array((3, 4), dtype)
    before, bits = block_checksum(array), 8 * array.itemsize
    for i, bit in itertools.product(range(array.size), [0] if dtype == np.bool_ else range(bits)):
        flipped = array.copy()
        flipped.reshape(-1).view(f"uint{bits}")[i] ^= 1 << bit
        assert block_checksum(flipped) != before


def test_changes_that_a_linear_sum_misses():
    """Two sign bits flipped; +x swapped with -x; and ordinary swaps, rolls, a transpose."""
    x = random_array((8, 8), np.float32)
    before = block_checksum(x)
    for i, j in itertools.combinations(range(8), 2):
        signs, swapped, opposite = x.copy(), x.copy(), x.copy()
        signs[[i, j], [i, j]] *= -1
        swapped[[i, j]] = x[[j, i]]
        assert before not in (block_checksum(signs), block_checksum(swapped))
        opposite[0, i], opposite[0, j] = 1.0, -1.0
        other = opposite.copy()
        other[0, i], other[0, j] = -1.0, 1.0
        assert block_checksum(opposite) != block_checksum(other)
    assert block_checksum(np.roll(x, 1)) != before != block_checksum(x.T)
    assert block_checksum(np.float32([0.0])) != block_checksum(np.float32([-0.0]))


@pytest.mark.parametrize("spec", [(None, "fsdp"), ("fsdp", "tensor"), (("fsdp", "tensor"), None), ()])
def test_describe_is_the_same_on_every_sharding(spec):
    """And gathers nothing."""
    x = random_array((16, 24), np.float32)
    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
    placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    assert device_checksum(placed) == reference(x)
    program = arrays._checksum.lower(placed).compile().as_text()
    assert not any(word in program for word in ("all-gather", "all-to-all", "collective-permute"))
    assert spec == () or "all-reduce" in program


@pytest.mark.parametrize("shape", [(5, 2**31), (40, 5120, 17920), (3, 2**32), (2**31, 2, 5), (2**20, 2**12, 7)])
def test_positions_beyond_32_bits(shape):
    rng = np.random.default_rng(0)
    corners = [[0, size - 1, *rng.integers(0, size, 3).tolist()] for size in shape]
    for index in itertools.product(*corners):
        row = sum(i * math.prod(shape[axis + 1 : -1]) for axis, i in enumerate(index[:-1]))
        assert block_checksum(np.full((1,) * len(index), 7, np.int32), index, shape) == term(7, row, index[-1])


@pytest.mark.parametrize("shape", [(2**32 + 1,), (2**31, 3, 5)])
def test_too_large_arrays_are_refused(shape):
    with pytest.raises(ValueError, match="is too large for a checksum"):
        block_checksum(np.zeros((1,) * len(shape), np.int8), (0,) * len(shape), shape)


@pytest.mark.parametrize("tile", [7, 1 << 16])
def test_streamed_blocks_add_up(monkeypatch, tile):
    monkeypatch.setattr(checksums, "_TILE", tile)
    x = random_array((4, 6, 10), ml_dtypes.bfloat16)
    regions = [(slice(a, a + 2), slice(b, b + 3), slice(c, c + 5)) for a in (0, 2) for b in (0, 3) for c in (0, 5)]
    streamed = StreamedChecksums()
    for _ in range(2):  # a complete array may be read again
        found = [streamed.add("x", x[region], [s.start for s in region], x.shape) for region in regions]
        assert found[:-1] == [None] * 7
        assert found[-1] == Array("bfloat16", (4, 6, 10), f"{block_checksum(x):08x}")
    assert device_checksum(x) == block_checksum(x)


def test_describe_refuses_64_bits():
    with pytest.raises(ValueError, match="b/c is float64"):
        arrays.describe({"b": {"c": np.zeros(3)}})


def test_difference_names_the_first_array():
    saved = {name: Array("float32", (2,), "00000001") for name in "abc"}
    assert difference(saved, saved) is None
    found = saved | {"c": Array("float32", (2,), "00000002"), "b": Array("float32", (2,), "00000003")}
    assert difference(saved, found) == (
        "its array b, and 1 more, does not hold what was saved (checksum 00000003, saved as 00000001)"
    )
    del found["a"]
    assert "its array a, and 2 more," in difference(saved, found)
