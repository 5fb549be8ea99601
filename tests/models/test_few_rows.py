"""Products of few rows: the same results in another order, and the order that the compiler must keep."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from phivision_jax.models.few_rows import MOST_ROWS, are_few, project_few
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
