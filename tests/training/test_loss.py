"""The tiled cross-entropy against the plain one: losses, hits and gradients, for any tile, on any mesh."""

from __future__ import annotations

import functools
import math
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


ALL = jnp.ones((B, T), bool)


def plain(x, kernel, targets, counted=ALL):
    logits = jnp.einsum("BTD,VD->BTV", x, kernel, preferred_element_type=jnp.float32)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    losses, hits = jax.nn.logsumexp(logits, axis=-1) - picked, logits.argmax(-1) == targets
    return jnp.where(counted, losses, 0), hits & counted


def inputs(dtype=jnp.float32, scale=1.0):
    rng = np.random.default_rng(0)
    x = jnp.asarray(scale * rng.normal(size=(B, T, D)), dtype)
    kernel = jnp.asarray(rng.normal(size=(V, D)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)
    targets = targets.at[0].set(jnp.argmax(x[0].astype(jnp.float32) @ kernel.T, -1))  # some hits
    return x, kernel, targets


def weighed(function, shape=(B, T)):
    weights = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)
    return lambda x, kernel, targets: (function(x, kernel, targets)[0] * weights).sum()


@pytest.mark.parametrize("tile", [96, 95, 40, 7, 1])
@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_cross_entropy_equals_plain(tile, scale):
    args = inputs(scale=scale)  # at 40, exp of the logits would overflow

    def tiled(x, kernel, targets):
        return cross_entropy(x, kernel, targets, ALL, tile)

    (losses, hits), (expected, expected_hits) = tiled(*args), plain(*args)
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-5 * scale)
    np.testing.assert_array_equal(hits, expected_hits)
    assert hits.dtype == bool and losses.dtype == jnp.float32
    assert hits[0].all() and not hits.all()
    for gradient, wanted in zip(*(jax.grad(weighed(f), (0, 1))(*args) for f in (tiled, plain)), strict=True):
        np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("factor", [1.0, 1e-3, 1e3])
def test_batch_loss_depends_on_ratios_of_weights(factor):
    x, kernel, targets = inputs()
    weights = jnp.asarray(np.random.default_rng(2).integers(0, 3, (B, T)), jnp.float32)
    head = types.SimpleNamespace(kernel=np.asarray(kernel), scale=None)
    model = types.SimpleNamespace(hidden=lambda _: x, decoder=types.SimpleNamespace(lm_head=head))
    groups = jnp.zeros((B, T), jnp.int32)
    batch = types.SimpleNamespace(targets=targets, loss_weights=factor * weights, group_ids=groups)
    found, _ = loss.batch_loss(model, batch)
    wanted = (plain(x, kernel, targets)[0] * weights).sum() / weights.sum()
    assert float(found) == pytest.approx(float(wanted), rel=1e-5)
    batch.loss_weights = jnp.zeros((B, T))
    assert float(loss.batch_loss(model, batch)[0]) == 0.0


def test_cross_entropy_hits_of_equal_logits():
    x = jnp.ones((1, 3, 1))
    kernel = jnp.asarray([[0.0], [2.0], [1.0], [2.0]])
    targets = jnp.asarray([[1, 3, 0]], jnp.int32)
    for tile in (4, 2, 1):
        assert cross_entropy(x, kernel, targets, targets >= 0, tile)[1].tolist() == [[True, False, False]]


def with_counts(counts, length=40):
    """Arguments with one row per count, which has this number of counted positions, the last one among them."""
    rng = np.random.default_rng(4)
    counted = np.zeros((len(counts), length), bool)
    for row, count in zip(counted, counts, strict=True):
        row[rng.choice(length - 1, max(count - 1, 0), replace=False)] = True
        row[-1] = count > 0
    # Where not counted, exp of the logits overflows.
    x = jnp.asarray(np.where(counted, 1, 40)[..., None] * rng.normal(size=(*counted.shape, D)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(V, D)), jnp.float32)
    targets = jnp.where(rng.random(counted.shape) < 0.5, (x @ kernel.T).argmax(-1), 3).astype(jnp.int32)
    return x, kernel, targets, jnp.asarray(counted)


@pytest.mark.parametrize("counts", [(0, 0), (1, 10), (10, 10), (10, 11), (2, 40), (0, 3)], ids=str)
@pytest.mark.parametrize("tile", [V, 40])
def test_cross_entropy_ignores_uncounted_positions(counts, tile):
    x, kernel, targets, counted = with_counts(counts)

    def evaluate(function):
        def run(x, kernel):
            losses, hits = function(x, kernel, targets, counted)
            weights = np.random.default_rng(1).normal(size=losses.shape)
            return (losses * weights).sum(), (losses, hits)

        return jax.value_and_grad(run, (0, 1), has_aux=True)(x, kernel)

    found, expected = evaluate(functools.partial(cross_entropy, tile=tile)), evaluate(plain)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)
    assert found[0][1][1].any() == (max(counts) > 1)


@pytest.mark.parametrize("counts, everywhere", [((10, 3), False), ((10, 11), True)])
def test_head_is_applied_to_a_quarter_of_the_positions(counts, everywhere):
    """Detected by a NaN in an uncounted position: if that is computed too, it spoils the head's gradient."""
    x, kernel, targets, counted = with_counts(counts)
    x = x.at[0, jnp.argmin(counted[0])].set(jnp.nan)
    gradient = jax.grad(lambda kernel: cross_entropy(x, kernel, targets, counted)[0].sum())(kernel)
    assert bool(jnp.isnan(gradient).any()) == everywhere


@pytest.mark.parametrize("platform, products", [("cpu", 8), ("cuda", 8), ("tpu", 4)])
def test_tpu_program_has_one_size_of_the_head(platform, products):
    """Four products: the logits; in the backward pass the logits, dx, dW."""
    args = with_counts((1, 1))
    gradient = jax.jit(jax.grad(weighed(lambda *a: cross_entropy(*a, args[3]), args[2].shape), (0, 1)))
    text = gradient.trace(*args[:3]).lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.dot_general") == products


def test_bf16_products_are_summed_in_fp32():
    x, kernel, targets = inputs(jnp.bfloat16)
    losses, _ = cross_entropy(x, kernel, targets, ALL, 16)
    expected, _ = plain(x, kernel.astype(jnp.bfloat16), targets)
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, expected, atol=1e-5)


MESHES = [{"data": 8}, {"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"fsdp": 2, "tensor": 2, "data": 2}]


AXES = ("batch", "length"), ("vocab", "embed"), ("batch", "length"), ("batch", "length")


def place(mesh, counted):
    """x, kernel, targets and ``counted`` on a mesh, and their shardings."""
    shardings = [jax.NamedSharding(mesh, sharding.partition_spec(axes)) for axes in AXES]
    return [jax.device_put(a, s) for a, s in zip((*inputs(), counted), shardings, strict=True)], shardings


def value_and_grads(form, x, kernel, targets, counted):
    run = weighed(lambda *a: form(*a, counted))
    return jax.value_and_grad(run, (0, 1))(x, kernel, targets)


@pytest.mark.parametrize("most", [1, T])
@pytest.mark.parametrize("shape", [*MESHES, {"fsdp": 2, "context": 2}], ids=str)
def test_cross_entropy_sharded_equals_unsharded(shape, most):
    """Also with one counted position per row, for which the head is applied to a sixth of the positions."""
    mesh = sharding.make_mesh(shape, jax.devices()[: math.prod(shape.values())])
    counted = (jnp.arange(T) - jnp.arange(B)[:, None]) % T < most
    form = functools.partial(cross_entropy, tile=24)
    expected = value_and_grads(plain, *inputs(), counted)
    with jax.set_mesh(mesh):
        args, shardings = place(mesh, counted)
        run = jax.jit(functools.partial(value_and_grads, form), out_shardings=(None, (shardings[0], shardings[1])))
        found = run(*args)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)


def test_head_is_gathered_once_per_pass():
    """In the compiled program: no all-gather in a loop, no complete gradient, and hidden states are not moved."""
    mesh = sharding.make_mesh({"fsdp": 8})
    with jax.set_mesh(mesh):
        args, shardings = place(mesh, ALL)
        gradient = jax.grad(lambda *a: weighed(lambda *b: cross_entropy(*b, a[3], 24))(*a[:3]), (0, 1))
        text = jax.jit(gradient, out_shardings=(shardings[0], shardings[1])).lower(*args).compile().as_text()

    def sizes(collective: str) -> list[int]:
        shapes = re.findall(rf"= \w+\[([\d,]+)\]\S* {collective}\(", text)
        return [int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes]

    assert " conditional(" in text
    assert sizes("all-gather") in ([V * D], [V * D] * 2)
    assert all(size < V * D for size in sizes("all-reduce"))


def test_num_tiles_divides_every_shard():
    assert loss._num_tiles(100_352, 8192) == 14 and 100_352 / 14 == 7168
    assert loss._num_tiles(512, 8192) == 1 and loss._num_tiles(97, 10) == 97
    with jax.set_mesh(sharding.make_mesh({"fsdp": 4, "tensor": 2})):
        assert loss._num_tiles(96, 40) == 3
