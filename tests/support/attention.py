"""Inputs and comparisons that the tests of all attention implementations share."""

import jax
import jax.numpy as jnp
import numpy as np

from phivision_jax.models.attention.blockwise import plain


def arrays(rng, B, T, N, K, H, S=None):
    """q [B, T, N, H], k and v [B, S, K, H]; S is T by default."""
    return [jnp.asarray(rng.normal(size=(B, *size, H)), jnp.float32) for size in ((T, N), (S or T, K), (S or T, K))]


def packing(rng, B, T, bidirectional, ascending=True):
    """Segments of 1 to T/2 positions and span_end, [B, T] each, with up to one image at a random place in each segment.

    Either ids ascend and padding comes last, or ids are in any order and padding is anywhere between them.
    """
    segments, span = np.zeros((B, T), np.int32), np.tile(np.arange(T, dtype=np.int32), (B, 1))
    for b in range(B):
        start, end = 0, T - int(rng.integers(1, T // 4 + 1)) if ascending else T
        ids = list(range(T, 0, -1)) if ascending else list(rng.permutation(np.arange(1, T + 1)))
        while start < end:
            stop = min(start + int(rng.integers(1, T // 2)), end)
            if ascending or rng.random() < 0.8:
                segments[b, start:stop] = ids.pop()
                first, last = np.sort(rng.integers(start, stop, 2))
                if bidirectional:
                    span[b, first : last + 1] = last
            start = stop
    return jnp.asarray(segments), jnp.asarray(span)


def by_plain(q, k, v, segments, span):
    """Self-attention by the reference; ``span`` may be None."""
    return plain(q, k, v, segments, segments, jnp.full_like(segments, q.shape[1]) if span is None else span)


def with_gradients(form, weight, q, k, v, segments, *others):
    """(gradients of q, k and v; the result), both zero for padding's queries."""

    def loss(q, k, v, segments, *others):
        out = form(q, k, v, segments, *others) * (segments > 0)[..., None, None]
        return (out * weight).sum(), out

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v, segments, *others)


def assert_alike(got, want, atol=1e-5):
    """Equal dtypes, and values within ``atol``."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), atol=atol)
