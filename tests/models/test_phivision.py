import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from phivision_jax.config import ModelConfig
from phivision_jax.models import phivision
from phivision_jax.models.phivision import PhiVision, merge_features, splice
from phivision_jax.models.vision_tail import VisionTail
from phivision_jax.rows import batch_from_ids
from phivision_jax.training.loss import batch_loss
from tests.support.batches import EXAMPLES, random_rows
from tests.support.parameter_trees import abstract_params


def shapes(tree):
    return jax.tree.map(lambda leaf: tuple(leaf.shape), tree)


def test_released_size_and_the_converters_tree_are_the_models():
    config = ModelConfig()
    _, state = phivision.abstract(config)
    tail = nnx.eval_shape(lambda: VisionTail(config.vision, rngs=nnx.Rngs(0)))
    model = nnx.to_pure_dict(state) | {"vision_tail": nnx.to_pure_dict(nnx.state(tail, nnx.Param))}
    leaves = jax.tree.leaves(model)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    assert sum(math.prod(leaf.shape) for leaf in leaves) == 15_119_518_144
    assert shapes(model) == shapes(abstract_params(config))


def test_every_parameter_has_one_logical_axis_per_dimension():
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


def test_the_gradient_of_a_vision_token_is_that_of_the_column_where_it_landed():
    index = jnp.array([[-1, 2, 0, -1, 1], [3, -1, -1, -1, -1]])  # 3 in row 0 and 0, 1, 2 in row 1: nowhere
    gradient = 1.0 + jnp.arange(20.0).reshape(2, 5, 2)
    embeds, vision = jnp.zeros((2, 5, 2)), jnp.zeros((2, 4, 2))
    to_embeds, to_vision = jax.vjp(lambda e, v: splice(e, v, index), embeds, vision)[1](gradient)
    g = gradient.tolist()
    none = [0.0, 0.0]
    assert to_embeds.tolist() == [[g[0][0], none, none, g[0][3], none], [none, *g[1][1:]]]
    assert to_vision.tolist() == [[g[0][2], g[0][4], g[0][1], none], [none, none, none, g[1][0]]]


def test_merge_table_by_hand():
    features = jnp.array([[[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]]])  # R·P = 3, C = 2
    index = jnp.array([[[[0, 1], [2, -1]], [[-1, -1], [1, 1]]]])  # M 2, G 2, K 2
    weight = jnp.array([[[[0.5, 0.25], [2.0, 9.0]], [[1.0, 1.0], [1.0, -1.0]]]])
    out = merge_features(features, index, weight)
    assert out[0].tolist() == [[0.5 + 0.5, 5.0 + 5.0, 6.0, 60.0], [0.0, 0.0, 0.0, 0.0]]


def test_identity_merge_table_changes_nothing_and_space_to_channel_runs(tiny):
    batch = random_rows(np.random.default_rng(5), tiny.config, [[(6, [(2, 3)])]])
    M = batch.patches.shape[2]
    identity = batch._replace(
        merge_index=np.arange(M, dtype=np.int32).reshape(1, M, 1, 1),
        merge_weight=np.ones((1, M, 1, 1), np.float32),
    )
    np.testing.assert_allclose(tiny.vision_tokens(identity), tiny.vision_tokens(batch), atol=1e-6)
    wide = dataclasses.replace(tiny.config, projector=dataclasses.replace(tiny.config.projector, merge_size=2))
    model = PhiVision(wide, rngs=nnx.Rngs(0))
    pairs = batch._replace(
        merge_index=np.array([[[[0], [1]], [[2], [-1]]]], np.int32),
        merge_weight=np.ones((1, 2, 2, 1), np.float32),
    )
    assert model.vision_tokens(pairs).shape == (1, 2, tiny.config.decoder.hidden_size)


@pytest.mark.parametrize("image_attention", ["causal", "bidirectional"])
@pytest.mark.parametrize("vision_rows", [1, 2])
def test_packed_equals_one_by_one(tiny, image_attention, vision_rows):
    """The same loss and, per parameter, the same gradient: 0 to 5 images per example, two rows."""
    config = dataclasses.replace(tiny.config, image_attention=image_attention)
    graphdef, params = tiny.split()

    @jax.jit
    def loss_and_grads(params, batch):
        def loss(params):
            value, aux = batch_loss(phivision.merge(graphdef, params), batch)
            return value * aux["weight"], aux["weight"]

        (total, weight), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return total, weight, grads

    def seeded(rows, **kw):
        return random_rows(np.random.default_rng(7), config, rows, **kw)

    # 25 and 29 patches: with two vision rows of 20, images stand in both.
    packed = seeded(
        [EXAMPLES[:4], EXAMPLES[4:]], vision_rows=vision_rows, length=96, num_patches={1: 40, 2: 20}[vision_rows]
    )
    assert (packed.patch_segments.max(-1) > 0).all()
    total, weight, grads = loss_and_grads(params, packed)
    # The same draws, one example per row, taken row by row.
    alone = seeded([[e] for e in EXAMPLES], length=48, num_patches=24)
    singles = [jax.tree.map(lambda x, i=i: x[i : i + 1], alone) for i in range(len(EXAMPLES))]
    assert float(packed.loss_weights.sum()) == float(alone.loss_weights.sum()) > 20
    sums = [loss_and_grads(params, single) for single in singles]
    total_1, weight_1 = sum(s[0] for s in sums), sum(s[1] for s in sums)
    assert abs(total / weight - total_1 / weight_1) <= 1e-5
    grads_1 = jax.tree.map(lambda *g: sum(g), *[s[2] for s in sums])
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        other = grads_1
        for part in path:
            other = other[part.key]
        if path[-2].key == "k_proj" and path[-1].key == "bias":
            continue  # a key bias moves all scores of a query alike: its gradient is zero up to rounding
        assert float(jnp.linalg.norm(g)) > 0, path
        cosine = jnp.vdot(g, other) / (jnp.linalg.norm(g) * jnp.linalg.norm(other))
        assert cosine >= 0.99999, (path, cosine)


def test_bidirectional_differs_from_causal_inside_images_only(tiny):
    causal = random_rows(np.random.default_rng(3), tiny.config, [[(6, [(2, 2)])]])
    config = dataclasses.replace(tiny.config, image_attention="bidirectional")
    both = random_rows(np.random.default_rng(3), config, [[(6, [(2, 2)])]])
    at_image = causal.vision_index[0] >= 0
    difference = np.abs(np.asarray(tiny(both) - tiny(causal)))[0].max(-1)
    assert (difference[: np.argmax(at_image)] < 1e-6).all()
    assert difference[at_image][:-1].min() > 1e-4


def test_a_batch_of_text_needs_no_patches(tiny):
    batch = batch_from_ids([[1, 2, 3]], config=tiny.config)
    padded = batch_from_ids([[1, 2, 3]], config=tiny.config, num_patches=8)
    assert batch.patches.shape[2] == 0
    assert tiny.vision_features(batch).shape == (1, 1, 0, tiny.config.vision.hidden_size)
    assert tiny.vision_tokens(batch).shape == (1, 0, tiny.config.decoder.hidden_size)
    np.testing.assert_allclose(tiny(batch), tiny(padded), atol=1e-6)


def test_parameters_may_be_kept_in_bf16_while_computing_in_fp32(tiny):
    """Equal to the same weights widened beforehand: nothing but the weights is rounded."""
    graphdef, params = tiny.split()
    kept = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    widened = jax.tree.map(lambda x: x.astype(jnp.float32), kept)
    batch = random_rows(np.random.default_rng(2), tiny.config, [[(6, [(2, 3)])]])
    logits = [phivision.merge(graphdef, p)(batch) for p in (kept, widened)]
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-5)
