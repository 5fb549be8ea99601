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
from phivision_jax.checkpoint.checksums import StreamedChecksums, difference
from phivision_jax.checkpoint.layout import Array

DTYPES = [np.float32, ml_dtypes.bfloat16, np.float16, np.int32, np.uint32, np.uint8, np.bool_]


def mix(x: int) -> int:
    """MurmurHash3's finalizer, in integers."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
    x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
    return x ^ (x >> 16)


def reference(array: np.ndarray) -> str:
    columns = array.shape[-1] if array.ndim else 1
    words = array.reshape(-1).view(f"uint{8 * array.itemsize}").tolist()
    row_sums, column_sums = [0] * (math.prod(array.shape[:-1])), [0] * columns
    for i, word in enumerate(words):
        row_sums[i // columns] += word
        column_sums[i % columns] += word
    rows = sum(mix(total % 2**32 ^ mix(r ^ 0x9E3779B9)) for r, total in enumerate(row_sums))
    columns = sum(mix(total % 2**32 ^ mix(c)) for c, total in enumerate(column_sums))
    return f"{rows % 2**32:08x}{columns % 2**32:08x}"


def checksum(array) -> str:
    return StreamedChecksums().add("x", array, (), array.shape).checksum


def device_checksum(array) -> str:
    return arrays.describe({"x": array})["x"].checksum


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
    assert device_checksum(jnp.asarray(array)) == checksum(array) == reference(array)


def test_describe_names_arrays_by_path():
    tree = {"a": {"b": np.ones(2, np.float32)}, "c": (np.ones(3, ml_dtypes.bfloat16), np.float32(1))}
    found = arrays.describe(tree)
    assert found.keys() == {"a/b", "c/0", "c/1"}
    assert found["c/0"][:2] == ("bfloat16", (3,)) and found["c/1"].shape == ()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_single_bit_changes_both_halves(dtype):
    array = random_array((3, 4), dtype)
    before, bits = checksum(array), 8 * array.itemsize
    for i, bit in itertools.product(range(array.size), [0] if dtype == np.bool_ else range(bits)):
        flipped = array.copy()
        flipped.reshape(-1).view(f"uint{bits}")[i] ^= 1 << bit
        after = checksum(flipped)
        assert after[:8] != before[:8] and after[8:] != before[8:]


def test_changes_that_cancel_in_one_direction_are_detected():
    """Two sign bits flipped; +x swapped with -x; elements, rows, columns and blocks exchanged; a transpose."""
    x = random_array((8, 8), np.float32)
    x[0, :2] = 1.0, -1.0
    before = checksum(x)
    for i, j in itertools.combinations(range(8), 2):
        for pair in (((0, i), (0, j)), ((i, 0), (j, 0)), ((i, i), (j, j))):
            changed = x.copy()
            for element in pair:
                changed[element] *= -1
            assert checksum(changed) != before
        for a, b in (((0, i), (0, j)), ((i, 0), (j, 0)), ((i, i), (j, j))):
            changed = x.copy()
            changed[a], changed[b] = x[b], x[a]
            assert checksum(changed) != before
        rows, columns = x.copy(), x.copy()
        rows[[i, j]], columns[:, [i, j]] = x[[j, i]], x[:, [j, i]]
        assert before not in (checksum(rows), checksum(columns))
    blocks = x.copy()
    blocks[:4, :4], blocks[4:, 4:] = x[4:, 4:], x[:4, :4]
    assert before not in (checksum(blocks), checksum(np.roll(x, 1)), checksum(x.T), checksum(np.zeros_like(x)))
    assert checksum(np.float32([0.0])) != checksum(np.float32([-0.0]))


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


@pytest.mark.parametrize("shape", [(2**32 + 1,), (2**31, 3, 5)])
def test_too_large_arrays_are_refused(shape):
    with pytest.raises(ValueError, match="is too large for a checksum"):
        arrays.describe({"x": jax.ShapeDtypeStruct(shape, jnp.int8)})


@pytest.mark.parametrize("tile", [7, 1 << 16])
def test_streamed_blocks_add_up(monkeypatch, tile):
    monkeypatch.setattr(checksums, "_TILE", tile)
    x = random_array((4, 6, 10), ml_dtypes.bfloat16)
    regions = [(slice(a, a + 2), slice(b, b + 3), slice(c, c + 5)) for a in (0, 2) for b in (0, 3) for c in (0, 5)]
    streamed = StreamedChecksums()
    for _ in range(2):  # a complete array may be read again
        found = [streamed.add("x", x[region], region, x.shape) for region in regions]
        assert found[:-1] == [None] * 7
        assert found[-1] == Array("bfloat16", (4, 6, 10), checksum(x))
    assert device_checksum(x) == checksum(x)


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
