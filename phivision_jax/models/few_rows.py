"""Products of few rows with a large matrix on CPUs, as decoding needs them.

XLA for CPUs copies the right side of a product to blocks before it multiplies. For many rows that pays; for a few it
takes longer than the multiplication. With the matrix on the left, nothing of it is copied:

    x [b, in] · W [in, out]            the right side is copied
    W [out, in] · xᵀ [in, b]           W is read once, at the bandwidth of the memory; the result is transposed
"""

import math

import jax
import jax.numpy as jnp

from phivision_jax.sharding import target_device

MOST_ROWS = 64
"""Beyond this, the order makes little difference."""


def are_few(x: jax.Array) -> bool:
    """True if a product of x [..., in] with a matrix [out, in] is to be computed by ``project_few``.

    In bf16 the order does not help.
    """
    few = math.prod(x.shape[:-1]) <= MOST_ROWS and x.dtype == jnp.float32
    return few and target_device().platform == "cpu"


def project_few(x: jax.Array, kernel: jax.Array, n: int) -> jax.Array:
    """x [..., *in] · kernel [*out, *in] = [..., *out], contracting the last ``n`` axes of both."""
    inner, out = tuple(range(-n, 0)), kernel.ndim - n
    # Without the barrier, the compiler moves the transposition into the product, which undoes the order.
    y = jax.lax.optimization_barrier(jnp.tensordot(kernel, x, axes=(inner, inner)))
    return jnp.moveaxis(y, range(out), range(-out, 0))
