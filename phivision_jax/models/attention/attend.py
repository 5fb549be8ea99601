"""Attention as one function, ``attend``, which both towers use.

A query sees a key when both are in the same segment, the key's position is at most the query's ``span_end``, and the
query's position is at most the key's ``last_query``:

    span_end = own position      causal
    span_end = end of the image  bidirectional inside an image, causal elsewhere
    span_end = None              the entire segment (the vision tower)
    last_query = None            no limit
    last_query = end of branch   sequences that begin alike: what they share is there once, and seen by all of them

    position      0  1  2  3  4  5           key  0 1 2 3 4 5
    token         a  ▢  ▢  b  c  ·     query a    x
    segment       1  1  1  1  2  0           ▢    x x x            span_end 2: each image token sees the entire image
    span_end      0  2  2  3  4  5           ▢    x x x
                                             b    x x x x
                                             c            x        another example: sees nothing before it
                                             ·              x      padding sees padding, so no softmax is empty

    position      0  1  2  3  4              key  0 1 2 3 4
    token         a  b  c  d  e        query a    x                sequences a b c and a b d e
    segment       1  1  1  1  1              b    x x
    span_end      0  1  2  3  4              c    x x x            last_query 2: only c sees c
    last_query    4  4  2  4  4              d    x x   x
                                             e    x x   x x

There are four implementations of this definition; the choice is made at trace time:

    splash       the TPU kernel (``splash.py``)
    flash        the kernels for Hopper and Blackwell GPUs (``flash.py``), for self-attention that they support
    blockwise    blocks of queries x keys (``blockwise.py``), for other long rows: scores need no memory
    plain        all scores at once (``blockwise.py``): the reference, used for short rows

Decoding with a cache, one query per sequence, is ``cached.attend_cached``.

Outputs at padding are finite but meaningless: padding sees only itself in the kernels, and is zero in blockwise.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int32

from phivision_jax.models.attention import flash
from phivision_jax.models.attention.blockwise import BLOCK, blockwise, plain
from phivision_jax.models.remat import ATTENTION
from phivision_jax.sharding import target_device

BACKENDS = ("auto", "tpu", "gpu", "xla")
backend = jax.make_user_context("auto")
"""``with backend("xla"):`` computes without kernels; ``"tpu"`` and ``"gpu"`` choose the kernels of those platforms, and
``"auto"`` those of the mesh in force (``sharding.target_device``). Part of jit's cache key."""

PLAIN_QUERIES = 256
"""The most queries for which all scores are held at once."""
KERNEL_QUERIES = 128
"""The fewest queries for which a kernel is used: shorter rows do not fill a block."""


def attend(
    q: Float[Array, "*B T N H"],
    k: Float[Array, "*B S K H"],
    v: Float[Array, "*B S K H"],
    *,
    segment_ids: Int32[Array, "*B T"],
    kv_segment_ids: Int32[Array, "*B S"] | None = None,
    span_end: Int32[Array, "*B T"] | None = None,
    last_query: Int32[Array, "*B S"] | None = None,
    axes: tuple[str | None, ...] = ("batch", "length", "heads"),
) -> Float[Array, "*B T N H"]:
    """Softmax attention with grouped heads: each of the K key heads serves N/K consecutive query heads.

    Args:
      q, k, v: unscaled; scores are scaled by H^-1/2. The softmax is fp32, the result has q's dtype.
      segment_ids: segment of each query. On GPUs each segment must be contiguous, as it is in every Batch.
      kv_segment_ids: segment of each key; None for self-attention, where keys share the queries' segments. Otherwise
        the last T keys are the queries' own, and those before them are context.
      span_end: last key position that each query sees, at least the query's own; None for no limit.
      last_query: number of the last of the T queries that sees each key; None for no limit, which the kernels need.
      axes: logical names of q's axes except the last: kernels and blocks run on each device's own shard.

    Raises:
      ValueError: for an unknown backend, where one is chosen.
      ImportError: on TPUs, without the version of tokamax that ``models/attention/flash.py`` names.
    """
    T, S = q.shape[-3], k.shape[-3]
    platform = _platform() if T >= KERNEL_QUERIES and last_query is None else None
    if platform == "tpu":
        from phivision_jax.models.attention.splash import splash  # needs packages that only TPUs need

        return splash(q, k, v, segment_ids=segment_ids, kv_segment_ids=kv_segment_ids, span_end=span_end, axes=axes)
    if kv_segment_ids is None:
        if platform == "gpu" and flash.supported(q, k, v):
            return flash.flash(q, k, v, segment_ids=segment_ids, span_end=span_end, axes=axes)
        kv_segment_ids = segment_ids
    if span_end is None:
        span_end = jnp.full_like(segment_ids, S - 1)
    if T > PLAIN_QUERIES:
        # Branches of a short row are short, so that most pairs of a large block would be masked.
        block = BLOCK // 2 if last_query is not None and T <= 4 * BLOCK else BLOCK
        return blockwise(q, k, v, segment_ids, kv_segment_ids, span_end, last_query, axes=axes, block=block)
    form = plain
    for _ in range(q.ndim - 4):
        form = jax.vmap(form)
    return checkpoint_name(form(q, k, v, segment_ids, kv_segment_ids, span_end, last_query), ATTENTION)


def _platform() -> str:
    if backend.value not in BACKENDS:
        raise ValueError(f"attention backend {backend.value!r} does not exist; choose one of {', '.join(BACKENDS)}")
    return target_device().platform if backend.value == "auto" else backend.value
