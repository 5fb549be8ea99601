import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from phivision_jax.models.siglip2 import interpolation_weights
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
