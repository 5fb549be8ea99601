"""Attention on TPUs: tokamax's splash kernel, with O(T) integers in place of a T×T mask.

The kernel walks over blocks of queries × keys. The smallest and largest ``span_end`` of a block of queries decide which
blocks it visits and which of those need a mask; inside a block it compares ``span_end`` with the key's position. It
then drops blocks whose segments do not meet:

    keys       0-3   4-7   8-11                 every block of queries sees a prefix of the keys, less other segments
    queries 0-3  part                           part: some pairs are masked by ``span_end``
            4-7  full  part                     full: none is (segments are compared in every block)
            8-11 ·     ·     part               ·:    never visited; in this example segment 2 begins at position 8

The kernel is a private module of tokamax, hence the check of its version (``flash.py``).
"""

import math
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int32

from phivision_jax.models.attention.flash import require_tokamax
from phivision_jax.models.attention.partition import shard_map_attention
from phivision_jax.models.remat import ATTENTION
from phivision_jax.sharding import target_device

require_tokamax()

from tokamax._src.ops.experimental.tpu.splash_attention import base  # noqa: E402
from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_kernel as kernel  # noqa: E402
from tokamax._src.ops.experimental.tpu.splash_attention.splash_attention_mask_info import MaskInfo  # noqa: E402

LANES = 128  # blocks are multiples of a vector register's width
PADDING = 2**30  # above every segment id
LOG2E = math.log2(math.e)


class Blocks(NamedTuple):
    """Sizes of a block, as the kernel names them: queries, keys brought into VMEM, keys per matrix product; the same
    three backward (``dkv``).
    """

    block_q: int
    block_kv: int
    block_kv_compute: int
    block_q_dkv: int
    block_kv_dkv: int
    block_kv_dkv_compute: int


# By JAX's device kind. Each compiles within the chip's VMEM; none has been timed on a chip.
_LARGE = Blocks(1024, 1024, 512, 1024, 1024, 512)
BLOCKS = {"TPU v5 lite": _LARGE, "TPU v5": _LARGE, "TPU v6 lite": _LARGE}  # v5e, v5p, v6e
# For other chips: fits the smallest scoped VMEM of any. And without span_end, where all of a block in which two images
# meet is computed: smaller blocks waste less on 2,000 patches.
SMALL_BLOCKS = Blocks(512, 512, 512, 512, 512, 512)


def splash(
    q: Float[Array, "*B T N H"],
    k: Float[Array, "*B S K H"],
    v: Float[Array, "*B S K H"],
    *,
    segment_ids: Int32[Array, "*B T"],
    kv_segment_ids: Int32[Array, "*B S"] | None = None,
    span_end: Int32[Array, "*B T"] | None = None,
    axes: tuple[str | None, ...] = ("batch", "length", "heads"),
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> Float[Array, "*B T N H"]:
    """Attention as ``models.attention.attend`` defines it, except in padding (segment 0).

    A padding position sees only itself, so that padding costs nothing; its result is finite but meaningless. Under a
    mesh each device computes its own rows, heads and queries, with all keys of the row (gathered along ``context``).

    Args:
      segment_ids: from 0 to 2^30; fastest where they do not decrease along the row and padding comes last.
      kv_segment_ids, axes: as in ``attend``.
      span_end: at least the query's own position.
      blocks: default: those for the device (``BLOCKS``); smaller where the row is short.
      interpret: run the kernel's Python on any backend; slow, for tests.
    """
    T, S, H = q.shape[-3], k.shape[-3], q.shape[-1]
    ids = jnp.where(segment_ids == 0, PADDING + jnp.arange(T), segment_ids)
    kv_ids = ids
    if kv_segment_ids is not None:  # own keys come last
        kv_ids = jnp.where(kv_segment_ids == 0, PADDING + jnp.arange(T - S, T), kv_segment_ids)
    # Scaled in fp32 and rounded once: in bf16 the factors themselves would be off by up to 0.2 %, always the same way.
    q = (q.astype(jnp.float32) * (H**-0.5 * LOG2E)).astype(q.dtype)
    if blocks is None:
        largest = BLOCKS.get(target_device().device_kind, SMALL_BLOCKS)
        blocks = SMALL_BLOCKS if span_end is None else largest

    lead = q.ndim - 3

    def local(q, k, v, q_ids, span_end, kv_ids):
        # One row at a time: under vmap every row would visit the blocks of all rows.
        rows = [None if x is None else x.reshape(-1, *x.shape[lead:]) for x in (q, k, v, q_ids, span_end, kv_ids)]
        return jax.lax.map(lambda row: _row(*row, blocks=blocks, interpret=interpret), tuple(rows)).reshape(q.shape)

    return shard_map_attention(local, q, k, v, (ids, span_end), (kv_ids,), axes=axes)


def _row(q, k, v, q_ids, span_end, kv_ids, *, blocks: Blocks, interpret: bool) -> Float[Array, "T N H"]:
    """One row: q [T, N, H], k and v [S, K, H], q_ids [T], span_end [T] or None, kv_ids [S]."""
    T, S = q.shape[0], k.shape[0]
    _, _, compute, _, _, compute_bwd = blocks
    bq, bkv = _block(T, blocks.block_q, LANES), _block(S, blocks.block_kv, compute)
    bq_bwd, bkv_bwd = _block(T, blocks.block_q_dkv, LANES), _block(S, blocks.block_kv_dkv, compute_bwd)
    blocks = Blocks(bq, bkv, min(bkv, compute), bq_bwd, bkv_bwd, min(bkv_bwd, compute_bwd))
    # Fill the last block with queries like the last one, so that each still sees a key, and with keys nobody sees.
    more_q = -T % math.lcm(bq, bq_bwd)
    more_kv = ((0, -S % math.lcm(bkv, bkv_bwd)), (0, 0), (0, 0))
    q, k, v = jnp.pad(q, ((0, more_q), (0, 0), (0, 0))), jnp.pad(k, more_kv), jnp.pad(v, more_kv)
    q_ids = jnp.pad(q_ids, (0, more_q), mode="edge")
    kv_ids = jnp.pad(kv_ids, more_kv[0], constant_values=-1)
    if span_end is not None:
        span_end = jnp.pad(span_end, (0, more_q), mode="edge")
    settings = {"q_prescaled_log2e": True, "residual_checkpoint_name": ATTENTION, "interpret": interpret}
    attention = kernel.SplashAttentionKernel(
        _mask_info(span_end, k.shape[0], bq, bkv, False),
        _mask_info(span_end, k.shape[0], bq_bwd, bkv_bwd, True),
        config=kernel.SplashConfig(**blocks._asdict(), **settings),
        is_mqa=False,
        save_residuals=False,
        mask_value=base.DEFAULT_MASK_VALUE,
        mask_function=None if span_end is None else operator.ge,  # span_end >= the key's position
        fwd_mask_sparsity=1.0 if span_end is None else 0.5,
        dkv_mask_sparsity=1.0 if span_end is None else 0.5,
    )
    q, k, v = (rearrange(x, "T N H -> N T H") for x in (q, k, v))
    out = attention(q, k, v, base.SegmentIds(q_ids, kv_ids))
    return rearrange(out, "N T H -> T N H")[:T]


def _mask_info(span_end: Int32[Array, " T"] | None, S: int, bq: int, bkv: int, backward: bool) -> MaskInfo:
    """The visibility of each block of queries × keys; the kernel itself selects which to visit, by segments.

    Invisible blocks are listed too: the gradient of keys that no query of this device sees (those of the other shards
    of the row, under ``context``) would otherwise never be written, not even with zeros.
    """
    nothing = MaskInfo(None, None, None, None, None, None, None)
    if span_end is None:  # all of every block is visible, as far as segments allow
        return nothing
    by_block = span_end.reshape(-1, bq)
    first, last = jnp.arange(0, S, bkv), jnp.arange(0, S, bkv) + bkv - 1
    some = by_block.max(1)[:, None] >= first
    every = by_block.min(1)[:, None] >= last
    state = some.astype(jnp.int8) + every  # visible: 0 nothing, 1 some of it, 2 all of it
    # Backward, the kernel walks over blocks of keys.
    return nothing._replace(block_mask=state.T if backward else state, q_sequence=span_end)


def _block(length: int, largest: int, multiple: int) -> int:
    """The size of equal blocks that cover ``length`` with little padding: at most ``largest``.

    Blocks are multiples of ``multiple``; those smaller than it are multiples of a register's width instead.
    """
    size = math.ceil(length / math.ceil(length / largest))
    unit = multiple if size > multiple else LANES
    return math.ceil(size / unit) * unit
