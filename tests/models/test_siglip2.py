import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from phivision_jax.config import VisionConfig
from phivision_jax.models.siglip2 import PositionEmbedding, interpolation_weights
from tests.support.batches import random_rows


def test_interpolation_weights_same_size():
    weights = interpolation_weights(jnp.arange(16), jnp.full(16, 16), 16)
    np.testing.assert_allclose(weights, np.eye(16), atol=1e-6)


def test_interpolation_weights_halving():
    """Output 0 of 4→2 is centred on 1.0 with a triangle of half-width 2: 3/4, 3/4, 1/4 at 0.5, 1.5, 2.5, normalised."""
    weights = interpolation_weights(jnp.array([0]), jnp.array([2]), 4)
    np.testing.assert_allclose(weights[0], np.array([3, 3, 1, 0]) / 7, atol=1e-6)


def test_interpolation_weights_doubling():
    """Output 1 of 2→4 is centred on 0.75: 3/4 of entry 0 and 1/4 of entry 1; output 0 is beyond the edge."""
    weights = interpolation_weights(jnp.array([0, 1]), jnp.array([4, 4]), 2)
    np.testing.assert_allclose(weights, [[1, 0], [0.75, 0.25]], atol=1e-6)


def defined_weights(size: int, side: int) -> np.ndarray:
    """The antialiased bilinear filter by its definition, [size, side] in fp64, one entry after the other."""
    scale = side / size
    width, out = max(scale, 1.0), np.zeros((size, side))
    for i in range(size):
        centre = scale * (i + 0.5)
        for x in range(max(int(centre - width + 0.5), 0), min(int(centre + width + 0.5), side)):
            out[i, x] = max(0.0, 1 - abs((x - centre + 0.5) / width))
        out[i] /= out[i].sum()
    return out


@pytest.mark.parametrize("height, width", [(188, 1), (2048, 1), (1, 188)])
def test_position_embedding_of_narrow_grids_is_the_defined_one(height, width):
    """The released code is up to 1.3 off for the grids one patch wide: PyTorch 2.13 resizes them in another way."""
    table = np.random.default_rng(0).normal(size=(256, 3)).astype(np.float32)
    config = VisionConfig(hidden_size=3, num_heads=1)
    embedding = PositionEmbedding(config, rngs=nnx.Rngs(0))
    embedding.embedding[...] = jnp.asarray(table)
    coords = jnp.stack(jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij"), -1).reshape(-1, 2)
    found = embedding(coords, jnp.broadcast_to(jnp.array([height, width]), coords.shape))
    rows, columns = defined_weights(height, 16), defined_weights(width, 16)
    want = np.einsum("hr,wc,rcC->hwC", rows, columns, table.reshape(16, 16, 3)).reshape(-1, 3)
    np.testing.assert_allclose(found, want, atol=1e-5)


@given(size=st.integers(1, 300), data=st.data())
def test_interpolation_weights_sum_to_one(size, data):
    index = data.draw(st.integers(0, size - 1))
    weights = np.asarray(interpolation_weights(jnp.array([index]), jnp.array([size]), 16))[0]
    assert weights.min() >= 0 and abs(weights.sum() - 1) < 1e-5


def test_features_do_not_depend_on_other_images(tiny):
    packed = random_rows(np.random.default_rng(1), tiny.config, [[(3, [(2, 3)]), (3, [(3, 1)])]])
    features = tiny.vision_features(packed)
    other = np.array(packed.patches)
    other[0, 0, 6:9] = 255 - other[0, 0, 6:9]  # the second image
    changed = tiny.vision_features(packed._replace(patches=other))
    np.testing.assert_array_equal(features[0, 0, :6], changed[0, 0, :6])
    assert np.abs(features[0, 0, 6:9] - changed[0, 0, 6:9]).max() > 1e-3
