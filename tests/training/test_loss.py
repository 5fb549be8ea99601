"""The tiled cross-entropy against the plain one: losses, hits, gradients; any tile, any mesh."""

from __future__ import annotations

import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phivision_jax import sharding
from phivision_jax.training import loss
from phivision_jax.training.loss import cross_entropy

B, T, D, V = 8, 6, 16, 96


def plain(x, kernel, targets):
    logits = jnp.einsum("BTD,VD->BTV", x, kernel, preferred_element_type=jnp.float32)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked, logits.argmax(-1) == targets


def made(dtype=jnp.float32, scale=1.0):
    rng = np.random.default_rng(0)
    x = jnp.asarray(scale * rng.normal(size=(B, T, D)), dtype)
    kernel = jnp.asarray(rng.normal(size=(V, D)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)
    targets = targets.at[0].set(jnp.argmax(x[0].astype(jnp.float32) @ kernel.T, -1))  # some hits
    return x, kernel, targets


def weighed(function):
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(B, T)), jnp.float32)
    return lambda x, kernel, targets: (function(x, kernel, targets)[0] * weights).sum()


@pytest.mark.parametrize("tile", [96, 95, 40, 7, 1])
@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_equals_the_plain_loss(tile, scale):
    args = made(scale=scale)  # at 40, exp of the bare logits would overflow

    def tiled(x, kernel, targets):
        return cross_entropy(x, kernel, targets, tile)

    (losses, hits), (expected, expected_hits) = tiled(*args), plain(*args)
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-5 * scale)
    np.testing.assert_array_equal(hits, expected_hits)
    assert hits[0].all() and not hits.all()
    for gradient, wanted in zip(*(jax.grad(weighed(f), (0, 1))(*args) for f in (tiled, plain)), strict=True):
        np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("factor", [1.0, 1e-3, 1e3])
def test_only_ratios_of_weights_matter(factor):
    x, kernel, targets = made()
    weights = jnp.asarray(np.random.default_rng(2).integers(0, 3, (B, T)), jnp.float32)
    head = types.SimpleNamespace(kernel=np.asarray(kernel))
    model = types.SimpleNamespace(hidden=lambda _: x, decoder=types.SimpleNamespace(lm_head=head))
    groups = jnp.zeros((B, T), jnp.int32)
    batch = types.SimpleNamespace(targets=targets, loss_weights=factor * weights, group_ids=groups)
    found, _ = loss.batch_loss(model, batch)
    wanted = (plain(x, kernel, targets)[0] * weights).sum() / weights.sum()
    assert float(found) == pytest.approx(float(wanted), rel=1e-5)
    batch.loss_weights = jnp.zeros((B, T))
    assert float(loss.batch_loss(model, batch)[0]) == 0.0


def test_the_first_of_equal_logits_is_the_likeliest():
    x = jnp.ones((1, 3, 1))
    kernel = jnp.asarray([[0.0], [2.0], [1.0], [2.0]])
    targets = jnp.asarray([[1, 3, 0]], jnp.int32)
    for tile in (4, 2, 1):
        assert cross_entropy(x, kernel, targets, tile)[1].tolist() == [[True, False, False]]


@pytest.mark.parametrize("tile, products", [(V, 3), (V // 2, 4)])
def test_logits_of_the_only_tile_are_not_made_again(tile, products):
    """Forward, dx, dW; and forward again where tiles follow each other."""
    gradient = jax.grad(weighed(lambda *a: cross_entropy(*a, tile)), (0, 1))
    assert str(jax.make_jaxpr(gradient)(*made())).count("dot_general") == products


def test_bf16_products_are_added_in_fp32():
    x, kernel, targets = made(jnp.bfloat16)
    losses, _ = cross_entropy(x, kernel, targets, 16)
    expected, _ = plain(x, kernel.astype(jnp.bfloat16), targets)
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, expected, atol=1e-5)


MESHES = [{"data": 8}, {"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"fsdp": 2, "tensor": 2, "data": 2}]


@pytest.mark.parametrize("tile", [24, V])
@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_sharded_equals_unsharded(shape, tile):
    mesh, args = sharding.make_mesh(shape), made()
    at = [jax.NamedSharding(mesh, sharding.partition_spec(a)) for a in (("batch",), ("vocab", "embed"), ("batch",))]

    def value_and_grads(x, kernel, targets):
        return jax.value_and_grad(weighed(lambda *a: cross_entropy(*a, tile)), (0, 1))(x, kernel, targets)

    expected = jax.value_and_grad(weighed(plain), (0, 1))(*args)
    with jax.set_mesh(mesh):
        run = jax.jit(value_and_grads, out_shardings=(None, (at[0], at[1])))
        found = run(*(jax.device_put(a, s) for a, s in zip(args, at, strict=True)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)


def test_the_table_is_gathered_once_each_way():
    """From the compiled program: no all-gather in a loop, and none of a whole gradient."""
    mesh = sharding.make_mesh({"fsdp": 8})
    at = [jax.NamedSharding(mesh, sharding.partition_spec(a)) for a in (("batch",), ("vocab", "embed"), ("batch",))]
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s) for a, s in zip(made(), at, strict=True)]
    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(weighed(lambda *a: cross_entropy(*a, 24)), (0, 1)), out_shardings=(at[0], at[1]))
        text = gradient.lower(*shapes).compile().as_text()

    def sizes(collective: str) -> list[int]:
        shapes = re.findall(rf"= f32\[([\d,]+)\]\S* {collective}\(", text)
        return [int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes]

    assert sizes("all-gather") in ([V * D], [V * D] * 2)
    assert all(size < V * D for size in sizes("all-reduce"))


def test_tiles_divide_every_shard():
    assert loss._num_tiles(100_352, 8192) == 14 and 100_352 / 14 == 7168
    assert loss._num_tiles(512, 8192) == 1 and loss._num_tiles(97, 10) == 97
    with jax.set_mesh(sharding.make_mesh({"fsdp": 4, "tensor": 2})):
        assert loss._num_tiles(96, 40) == 3
