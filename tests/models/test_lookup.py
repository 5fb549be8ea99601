"""Sharded embedding lookup: the same rows and the same gradient as from one table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from phivision_jax import sharding
from phivision_jax.models.lookup import lookup

MESHES = ({"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "context": 2}, {"data": 8})


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_lookup_on_mesh(sizes):
    rng = np.random.default_rng(0)
    table = rng.integers(-9, 9, (32, 16)).astype(np.float32)
    tokens = rng.integers(0, 5, (8, 6)).astype(np.int32)  # few ids, so that each is looked up many times
    gradient = rng.integers(-9, 9, (8, 6, 16)).astype(np.float32)  # integers: sums are exact in any order
    wanted = np.zeros_like(table)
    np.add.at(wanted, tokens, gradient)
    mesh = sharding.make_mesh(sizes)
    with jax.set_mesh(mesh):
        placed = NamedSharding(mesh, sharding.partition_spec(("vocab", "embed")))
        run = jax.jit(lambda table, g: (lookup(table, tokens), jax.vjp(lambda t: lookup(t, tokens), table)[1](g)[0]))
        rows, found = run(jax.device_put(table, placed), jnp.asarray(gradient))
    assert np.array_equal(rows, table[tokens])
    assert np.array_equal(found, wanted)
