"""Attention over a cache equals a softmax over the visible keys, written as a loop over sequences."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phivision_jax.models.attention.cached import KV, attend_cached, store
from phivision_jax.sharding import make_mesh


def expected(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """One query per head [N, H] over keys [K, s, H]."""
    out = []
    for n, query in enumerate(q):
        head = n * len(k) // len(q)
        scores = k[head] @ query / np.sqrt(len(query))
        weights = np.exp(scores - scores.max())
        out.append(weights / weights.sum() @ v[head])
    return np.array(out)


@pytest.mark.parametrize("among", ["all sequences", "some of the slots", "some slots on a mesh", "layers"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8])
@pytest.mark.parametrize(("B", "S"), [(1, 40), (1, 700), (3, 513), (12, 300), (40, 200)])
def test_equals_a_loop_over_sequences(B: int, S: int, dtype: jnp.dtype, among: str) -> None:
    """Lengths are 0 to S, in caches that are shorter than a block, longer, and no multiple of one."""
    K, N, H, columns = 2, 6, 8, 3
    rng = np.random.default_rng(B + S)

    def random(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    cache, recent = (store(random(B, s, K, H), random(B, s, K, H), dtype) for s in (S, columns))
    q, lengths = random(B, N, H), rng.integers(0, S + 1, B).astype(np.int32)
    lengths[0], column = S, 1
    given, settings = cache, {"read": S}
    if "some" in among:
        settings["slots"] = jnp.asarray(rng.permutation(B + 3)[:B])
        given = jax.tree.map(lambda x: jnp.full((B + 3, *x.shape[1:]), 5, x.dtype).at[settings["slots"]].set(x), cache)
    if among == "layers":  # the second of three, in a cache that has more entries than are read
        padded = jax.tree.map(lambda x: jnp.pad(x, [(0, 0), (0, 0), (0, 20), (0, 0)], constant_values=9), cache)
        given = jax.tree.map(lambda x: jnp.stack([x * 0 + 5, x, x * 0 + 7]), padded)
        settings["layer"] = jnp.int32(1)
    mesh = jax.set_mesh(make_mesh({}, jax.devices()[:1])) if "mesh" in among else contextlib.nullcontext()
    with mesh:
        out = attend_cached(jnp.asarray(q), given, jnp.asarray(lengths), recent, jnp.int32(column), **settings)
    for b, length in enumerate(lengths):

        def seen(kv: KV, count: int, b: int = b) -> list[np.ndarray]:
            return [np.swapaxes(np.asarray(x[b]), 0, 1)[:, :count] for x in kv.values(jnp.float32)]

        pairs = zip(seen(cache, length), seen(recent, column + 1), strict=True)
        keys, values = (np.concatenate(pair, axis=1) for pair in pairs)
        np.testing.assert_allclose(out[b], expected(q[b], keys, values), rtol=2e-5, atol=2e-6)
