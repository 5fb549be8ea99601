"""The forward pass of a model, compiled once for each shape."""

import functools

import jax

from phivision_jax.models import phivision
from tests.support.batches import QUICK


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def logits(graphdef, params, batch) -> jax.Array:
    """[B, T, V] of ``PhiVision.split()`` and a batch."""
    return phivision.merge(graphdef, params)(batch)
