"""The assembled model: its tree, merging and splicing by hand, packed rows against examples alone."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from phivision_jax.config import ModelConfig
from phivision_jax.models import phivision
from phivision_jax.models.layers import Linear
from phivision_jax.models.phivision import merge_features, splice
from phivision_jax.models.siglip2 import VisionTail
from phivision_jax.rows import batch_from_ids
from phivision_jax.training.loss import batch_loss
from tests.support.batches import EXAMPLES, QUICK, random_rows
from tests.support.forward import logits
from tests.support.parameter_trees import abstract_params


def shapes(tree):
    return jax.tree.map(lambda leaf: tuple(leaf.shape), tree)


def test_abstract_released_size_and_conversion_tree():
    config = ModelConfig()
    _, state = phivision.abstract(config)
    tail = nnx.eval_shape(lambda: VisionTail(config.vision, rngs=nnx.Rngs(0)))
    model = nnx.to_pure_dict(state) | {"vision_tail": nnx.to_pure_dict(nnx.state(tail, nnx.Param))}
    leaves = jax.tree.leaves(model)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    assert sum(math.prod(leaf.shape) for leaf in leaves) == 15_119_518_144
    assert shapes(model) == shapes(abstract_params(config))


def test_abstract_axes_match_dimensions():
    _, state = phivision.abstract(ModelConfig())
    for path, variable in nnx.to_flat_state(state):
        axes = variable.get_metadata()["out_sharding"]
        assert len(axes) == len(variable.get_value().shape), path
        assert (axes[0] == "layer") == ("layers" in path), path


def test_splice_by_hand():
    embeds = jnp.arange(8.0).reshape(1, 4, 2)
    vision = 100 + jnp.arange(4.0).reshape(1, 2, 2)
    out = splice(embeds, vision, jnp.array([[-1, 1, 0, -1]]))
    assert out[0].tolist() == [[0, 1], [102, 103], [100, 101], [6, 7]]


def test_splice_gradient_by_hand():
    index = jnp.array([[-1, 2, 0, -1, 1], [3, -1, -1, -1, -1]])  # unused: token 3 of row 0, tokens 0 to 2 of row 1
    gradient = 1.0 + jnp.arange(20.0).reshape(2, 5, 2)
    embeds, vision = jnp.zeros((2, 5, 2)), jnp.zeros((2, 4, 2))
    to_embeds, to_vision = jax.vjp(lambda e, v: splice(e, v, index), embeds, vision)[1](gradient)
    g = gradient.tolist()
    none = [0.0, 0.0]
    assert to_embeds.tolist() == [[g[0][0], none, none, g[0][3], none], [none, *g[1][1:]]]
    assert to_vision.tolist() == [[g[0][2], g[0][4], g[0][1], none], [none, none, none, g[1][0]]]


def test_merge_features_by_hand():
    features = jnp.array([[[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]]])  # R·P = 3, C = 2
    index = jnp.array([[[[0, 1], [2, -1]], [[-1, -1], [1, 1]]]])  # M 2, n 2, k 2
    weight = jnp.array([[[[0.5, 0.25], [2.0, 9.0]], [[1.0, 1.0], [1.0, -1.0]]]])
    out = merge_features(features, index, weight)
    assert out[0].tolist() == [[0.5 + 0.5, 5.0 + 5.0, 6.0, 60.0], [0.0, 0.0, 0.0, 0.0]]


def test_vision_tokens_with_merge_tables(tiny):
    batch = random_rows(np.random.default_rng(5), tiny.config, [[(6, [(2, 3)])]])
    M = batch.patches.shape[2]
    identity = batch._replace(
        merge_index=np.arange(M, dtype=np.int32).reshape(1, M, 1, 1),
        merge_weight=np.ones((1, M, 1, 1), np.float32),
    )
    np.testing.assert_allclose(tiny.vision_tokens(identity), tiny.vision_tokens(batch), atol=1e-6)
    wide = dataclasses.replace(tiny.config, projector=dataclasses.replace(tiny.config.projector, merge_size=2))
    graphdef, params = phivision.abstract(wide)
    pairs = batch._replace(
        merge_index=np.array([[[[0], [1]], [[2], [-1]]]], np.int32),
        merge_weight=np.ones((1, 2, 2, 1), np.float32),
    )
    tokens = jax.eval_shape(lambda p: phivision.merge(graphdef, p).vision_tokens(pairs), nnx.to_pure_dict(params))
    assert tokens.shape == (1, 2, tiny.config.decoder.hidden_size)


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def loss_and_grads(graphdef, params, batch):
    """Σ loss, Σ weight, and the gradients of the former."""

    def loss(params):
        value, aux = batch_loss(phivision.merge(graphdef, params), batch)
        return value * aux["weight"], aux["weight"]

    (total, weight), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return total, weight, grads


@pytest.fixture(scope="module", params=["causal", "bidirectional"])
def alone(request, tiny):
    """A configuration, and (Σ loss, Σ weight, gradients) of ``EXAMPLES`` one by one."""
    config = dataclasses.replace(tiny.config, image_attention=request.param)
    rows = random_rows(np.random.default_rng(7), config, [[e] for e in EXAMPLES], length=48, num_patches=24)
    singles = [jax.tree.map(lambda x, i=i: x[i : i + 1], rows) for i in range(len(EXAMPLES))]
    sums = [loss_and_grads(*tiny.split(), single) for single in singles]
    return config, jax.tree.map(lambda *parts: sum(parts), *sums)


@pytest.mark.parametrize("vision_rows, num_patches", [(1, 40), (2, 20)])
def test_packed_rows_equal_examples_alone(tiny, alone, vision_rows, num_patches):
    """The same loss and, per parameter, the same gradient: 0 to 5 images per example, in two rows."""
    config, (total_1, weight_1, grads_1) = alone
    packed = random_rows(
        np.random.default_rng(7),
        config,
        [EXAMPLES[:4], EXAMPLES[4:]],
        length=96,
        vision_rows=vision_rows,
        num_patches=num_patches,
    )
    # The rows have 25 and 29 patches: with two vision rows of 20, there are images in both.
    assert (packed.patch_segments.max(-1) > 0).all()
    total, weight, grads = loss_and_grads(*tiny.split(), packed)
    assert float(weight) == float(weight_1) > 20
    assert abs(total / weight - total_1 / weight_1) <= 1e-5
    for (path, g), other in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(grads_1), strict=True):
        if path[-2].key == "k_proj" and path[-1].key == "bias":
            continue  # a key bias shifts all scores of a query equally: its gradient is zero up to rounding
        assert float(jnp.linalg.norm(g)) > 0, path
        cosine = jnp.vdot(g, other) / (jnp.linalg.norm(g) * jnp.linalg.norm(other))
        assert cosine >= 0.99999, (path, cosine)


def test_bidirectional_differs_inside_images_only(tiny):
    causal = random_rows(np.random.default_rng(3), tiny.config, [[(6, [(2, 3)])]])
    config = dataclasses.replace(tiny.config, image_attention="bidirectional")
    both = random_rows(np.random.default_rng(3), config, [[(6, [(2, 3)])]])
    at_image = causal.vision_index[0] >= 0
    difference = np.abs(logits(*tiny.split(), both) - logits(*tiny.split(), causal))[0].max(-1)
    assert (difference[: np.argmax(at_image)] < 1e-6).all()
    assert difference[at_image][:-1].min() > 1e-4


def test_text_batch_needs_no_patches(tiny):
    batch = batch_from_ids([[1, 2, 3]], config=tiny.config)
    padded = batch_from_ids([[1, 2, 3]], config=tiny.config, num_patches=8)
    assert batch.patches.shape[2] == 0
    assert tiny.vision_features(batch).shape == (1, 1, 0, tiny.config.vision.hidden_size)
    assert tiny.vision_tokens(batch).shape == (1, 0, tiny.config.decoder.hidden_size)
    np.testing.assert_allclose(logits(*tiny.split(), batch), logits(*tiny.split(), padded), atol=1e-6)


def test_bf16_parameters_with_fp32_compute(tiny):
    """Equal to the same weights converted to fp32 beforehand: only the weights are rounded."""
    graphdef, params = tiny.split()
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    widened = jax.tree.map(lambda x: x.astype(jnp.float32), rounded)
    batch = random_rows(np.random.default_rng(2), tiny.config, [[(6, [(2, 3)])]])
    np.testing.assert_allclose(logits(graphdef, rounded, batch), logits(graphdef, widened, batch), atol=1e-5)


class RawPatches(nnx.Module):
    """Early fusion: no encoder, a feature is a linear map of a patch's pixels."""

    width = 20

    def __init__(self, cfg, *, rngs, dtype, remat):
        self.dtype = dtype
        self.embed = Linear("BRPF,FC->BRPC", (cfg.patch_dim, self.width), (None, "patch_embed"), rngs=rngs)

    def __call__(self, batch):
        return self.embed(batch.patches.astype(self.dtype) / 255)


def test_vision_side_is_exchangeable(tiny, monkeypatch):
    """Another vision side, with another width, gives logits and gets a gradient; the rest of the tree is the same."""
    config = dataclasses.replace(tiny.config, vision=dataclasses.replace(tiny.config.vision, encoder="raw"))
    with pytest.raises(ValueError, match=r"vision\.encoder 'raw' does not exist; choose one of siglip2"):
        phivision.abstract(config)
    monkeypatch.setitem(phivision.VISION_SIDES, "raw", RawPatches)
    graphdef, state = phivision.abstract(config)
    params, tree = tiny.split()[1], nnx.to_pure_dict(state)
    assert set(tree["vision"]) == {"embed"} and tree["decoder"].keys() == params["decoder"].keys()
    rng = np.random.default_rng(0)
    shapes = {"vision": tree["vision"], "projector": tree["projector"]}
    params = params | jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), shapes)
    batch = random_rows(rng, config, [[(6, [(2, 3)])]])
    total, _, grads = loss_and_grads(graphdef, params, batch)
    assert grads["projector"]["fc1"]["kernel"].shape == (20, config.decoder.hidden_size)
    assert np.isfinite(total) and np.abs(grads["vision"]["embed"]["kernel"]).max() > 0
