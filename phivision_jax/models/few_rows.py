"""Products of few rows with a large matrix on CPUs, as decoding needs them.

XLA for CPUs copies the right side of a product to blocks before it multiplies, and converts a narrow matrix to fp32 in
memory. For many rows that pays; for a few it takes longer than the multiplication. There are two ways around it:

    W [out, in] · xᵀ [in, b]           the matrix on the left, which is not copied; for fp32
    Σ_j W[j : j + s] · x[j : j + s]    element by element, which converts numbers as they are read; row by row, in
                                       any dtype: half the bytes take half the time
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from phivision_jax.sharding import target_device

MOST_ROWS = 64
"""Beyond this, the order makes little difference."""
PARTS = 8
"""Number of slices [s, out] of a kernel, which are added up before the sum over s."""
LANES = 16
"""Width s of slices [out, s]; as many fp32 numbers as a register holds."""
MOST_SINGLE = {1: 16, 2: 2, 4: 1}
"""Most rows that are multiplied one by one, by the bytes of a number of the matrix: each row reads it again. Matrices
in bf16 can be held in fp32 for more rows; those in int8 are not, and are converted at each step beyond."""
MOST_TERMS = 64
"""Most slices that one loop adds; with many more, the compiler is slow, and so are its loops."""


def are_few(x: jax.Array) -> bool:
    """True if a product of x [..., in] with a matrix [out, in] is to be computed by ``project_few``.

    In bf16 the order helps only on CPUs with arithmetic in bf16.
    """
    few = math.prod(x.shape[:-1]) <= MOST_ROWS and x.dtype == jnp.float32
    return few and target_device().platform == "cpu"


def are_single(rows: int, kernel_dtype: jnp.dtype, dtype: jnp.dtype) -> bool:
    """True if so many rows of ``dtype`` are to be multiplied one by one with a matrix of ``kernel_dtype``."""
    few = 0 < rows <= MOST_SINGLE.get(kernel_dtype.itemsize, 0) and dtype == jnp.float32
    return few and target_device().platform == "cpu" and jax.sharding.get_abstract_mesh().empty


def project_few(x: jax.Array, kernel: jax.Array, n: int) -> jax.Array:
    """x [..., *in] · kernel [*out, *in] = [..., *out], contracting the last ``n`` axes of both."""
    inner, out = tuple(range(-n, 0)), kernel.ndim - n
    # Without the barrier, the compiler moves the transposition into the product, which undoes the order.
    y = jax.lax.optimization_barrier(jnp.tensordot(kernel, x, axes=(inner, inner)))
    return jnp.moveaxis(y, range(out), range(-out, 0))


def project_single(x: jax.Array, kernel: jax.Array, n: int, *, outputs_first: bool = False) -> jax.Array:
    """x [..., *in] · kernel = [..., *out], row by row, contracting the last ``n`` axes of x.

    Args:
      x: fp32, as the result is.
      kernel: [*in, *out] in any dtype; with ``outputs_first`` [*out, *in].
    """
    *lead, size = *x.shape[: x.ndim - n], math.prod(x.shape[x.ndim - n :])
    out = kernel.shape[:-n] if outputs_first else kernel.shape[n:]
    matrix = kernel.reshape(*((-1, size) if outputs_first else (size, -1)))
    rows = jax.lax.map(lambda row: _multiply(row, matrix, axis=int(outputs_first)), x.reshape(-1, size))
    return rows.reshape(*lead, *out)


def _multiply(x: Float[Array, " in"], matrix: jax.Array, axis: int) -> Float[Array, " out"]:
    """Contract x with this axis of a matrix."""
    size = len(x)
    width = math.gcd(size, LANES) if axis else size // math.gcd(size, PARTS)
    # Depending on x, the matrix is not converted before a loop around this product, which would store it in fp32.
    matrix, x = jax.lax.optimization_barrier((matrix, x))
    x = jnp.expand_dims(x, 1 - axis)

    def term(start: int) -> jax.Array:
        part, factors = (jax.lax.slice_in_dim(y, start, start + width, axis=axis) for y in (matrix, x))
        return part.astype(jnp.float32) * factors

    starts = range(0, size, width)
    groups = [starts[i : i + MOST_TERMS] for i in range(0, len(starts), MOST_TERMS)]
    # Without the barriers, the compiler multiplies again for every element of the sum.
    return sum(jax.lax.optimization_barrier(sum(map(term, group))) for group in groups).sum(axis)  # type: ignore[union-attr]
