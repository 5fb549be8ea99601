"""Products of few rows: the same results in another order, and the order that the compiler must keep."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from phivision_jax.models.few_rows import LANES, MOST_ROWS, MOST_TERMS, are_few, are_single, project_few, project_single
from phivision_jax.models.layers import Linear
from phivision_jax.models.phi4 import Head
from tests.support.batches import TINY

EQUATIONS = [
    ("BTD,DF->BTF", (8, 12), (2, 3, 8)),
    ("BTD,DNH->BTNH", (8, 4, 3), (1, 1, 8)),
    ("BTNH,NHD->BTD", (4, 3, 8), (2, 1, 4, 3)),
]


@pytest.mark.parametrize(("equation", "kernel", "x"), EQUATIONS)
def test_linear_with_outputs_first_is_the_same(equation: str, kernel: tuple[int, ...], x: tuple[int, ...]) -> None:
    linear = Linear(equation, kernel, ("embed",) * len(kernel), rngs=nnx.Rngs(0), bias=True)
    linear.adapt(2, 4.0, nnx.Rngs(1))
    linear.lora_b.set_value(jax.random.normal(jax.random.key(2), linear.lora_b[...].shape))
    values = jax.random.normal(jax.random.key(3), x)
    expected = linear(values)
    linear.put_outputs_first()
    assert linear.kernel[...].shape == (*kernel[linear.num_inputs :], *kernel[: linear.num_inputs])
    np.testing.assert_allclose(linear(values), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [1, MOST_ROWS, MOST_ROWS + 1])
def test_head_of_few_rows_is_the_same(rows: int) -> None:
    head = Head(TINY.decoder, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (1, rows, TINY.decoder.hidden_size))
    assert are_few(x) == (rows <= MOST_ROWS and jax.default_backend() == "cpu")
    np.testing.assert_allclose(head(x), np.asarray(x) @ np.asarray(head.kernel[...]).T, rtol=1e-5, atol=1e-6)


def test_compiled_product_has_the_matrix_on_the_left() -> None:
    """On the right, XLA for CPUs copies the matrix at each product."""
    x, kernel = jnp.ones((4, 96)), jnp.ones((160, 96))
    text = jax.jit(lambda x, kernel: project_few(x, kernel, 1)).lower(x, kernel).compile().as_text()
    products = re.findall(r"= f32\[([\d,]+)\]\S* dot\(", text)
    assert products == ["160,4"], text


def test_bf16_keeps_its_order() -> None:
    assert not are_few(jnp.ones((1, 1, 8), jnp.bfloat16))


@settings(deadline=None, max_examples=12)
@given(
    rows=st.integers(1, 4),
    size=st.integers(1, 80),
    out=st.lists(st.integers(1, 12), min_size=1, max_size=2),
    outputs_first=st.booleans(),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16, jnp.int8]),
)
def test_single_rows_are_the_same(rows: int, size: int, out: list[int], outputs_first: bool, dtype: jnp.dtype) -> None:
    rng = np.random.default_rng(size)
    kernel = jnp.asarray(rng.integers(-9, 9, (*out, size) if outputs_first else (size, *out)), dtype)
    x = jnp.asarray(rng.integers(-9, 9, (rows, 1, size)), jnp.float32)
    matrix = np.asarray(kernel, np.float32).reshape((-1, size) if outputs_first else (size, -1))
    expected = np.asarray(x) @ (matrix.T if outputs_first else matrix)
    found = jax.jit(lambda x, kernel: project_single(x, kernel, 1, outputs_first=outputs_first))(x, kernel)
    np.testing.assert_array_equal(found, expected.reshape(rows, 1, *out))  # integers: exact in any order


def test_single_rows_of_a_wide_matrix_are_the_same() -> None:
    """The matrix has more slices than one loop adds, and two contracted axes."""
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((5, 2, LANES * (MOST_TERMS // 2 + 1))).astype(np.float32)
    x = rng.standard_normal((3, 2, LANES * (MOST_TERMS // 2 + 1))).astype(np.float32)
    found = jax.jit(lambda x, kernel: project_single(x, kernel, 2, outputs_first=True))(x, kernel)
    np.testing.assert_allclose(found, x.reshape(3, -1) @ kernel.reshape(5, -1).T, rtol=2e-5, atol=1e-4)


@pytest.mark.parametrize(("dtype", "most"), [(jnp.float32, 1), (jnp.bfloat16, 2), (jnp.int8, 16)])
def test_most_single_rows_depend_on_the_dtype_of_the_matrix(dtype: jnp.dtype, most: int) -> None:
    fp32, narrow = jnp.dtype(jnp.float32), jnp.dtype(dtype)
    assert [are_single(rows, narrow, fp32) for rows in (0, 1, most, most + 1)] == [False, True, True, False]
    assert not are_single(1, narrow, jnp.dtype(jnp.bfloat16))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("outputs_first", [False, True])
def test_narrow_matrix_is_never_stored_in_fp32(outputs_first: bool, rows: int) -> None:
    """It is not stored before a loop either, to which the compiler moves what does not depend on the loop."""
    shape = (1024, 320) if outputs_first else (320, 1024)
    kernel, x = jnp.ones(shape, jnp.bfloat16), jnp.ones((rows, 320))

    def loop(kernel: jax.Array, x: jax.Array) -> jax.Array:
        def step(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return project_single(x, kernel, 1, outputs_first=outputs_first)[:, :320], None

        return jax.lax.scan(step, x, length=4)[0]

    memory = jax.jit(loop).lower(kernel, x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < kernel.size * 4 / 2


@pytest.mark.parametrize(("equation", "kernel", "x"), EQUATIONS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8])
def test_linear_of_a_single_row_is_the_same(
    dtype: jnp.dtype, equation: str, kernel: tuple[int, ...], x: tuple[int, ...]
) -> None:
    linear = Linear(equation, kernel, ("embed",) * len(kernel), rngs=nnx.Rngs(0), bias=True)
    if dtype == jnp.int8:
        linear.kernel.set_value(jnp.round(linear.kernel[...] * 100).astype(jnp.int8))
        linear.scale = nnx.Param(jnp.full(kernel[linear.num_inputs :], 0.01))
    values = jax.random.normal(jax.random.key(3), (9, *x[-linear.num_inputs :]))
    np.testing.assert_allclose([linear(row) for row in values], linear(values), rtol=1e-5, atol=1e-6)
