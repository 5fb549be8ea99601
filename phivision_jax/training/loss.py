"""The loss: mean cross-entropy over the weighted target tokens of a batch, without ever holding the logits.

Logits of a row of 8,192 tokens over 100,352 entries are 3.3 GB in fp32, more than everything else a layer keeps. So the
head is applied to a tile of the vocabulary at a time:

    for each tile W [v, D]     logits [B, T, v] = x · W         forward: largest so far, Σ exp, the target's logit
    once more, backward        p = softmax − target             dx += p · W,  dW = p · x

A vocabulary of one tile is the exception: its logits are kept, for they would exist whole anyhow, moments later.
The table is gathered over fsdp once for the forward pass and once for the backward pass, before the loop; the gradient
of a tile is scattered to its owners as soon as it is made. Where the vocabulary is split over ``tensor``, a tile takes
an equal part of every shard.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from phivision_jax.batch import Batch
from phivision_jax.models.phivision import PhiVision
from phivision_jax.sharding import axis_size, constrain

TILE = 8192
"""Most vocabulary entries of a tile: large enough for the matrix units, small enough that its logits are cheap."""


def batch_loss(
    model: PhiVision, batch: Batch, num_groups: int = 1, total_weight: jax.Array | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean loss over all weighted targets of the global batch (never a mean of rows' means).

    Args:
      total_weight: what the sum is divided by; default: the batch's own weights. For a part of a larger batch: the
        larger batch's, so that the parts' losses and gradients add up to its own.

    Returns:
      The scalar loss, and sums to log: ``weight`` (), ``correct`` (), ``group_loss`` and ``group_weight``
      [num_groups] by ``batch.group_ids``.
    """
    losses, hits = cross_entropy(model.hidden(batch), model.decoder.lm_head.kernel[...], batch.targets)
    token_loss = losses * batch.loss_weights  # [B, T]
    weight = batch.loss_weights.sum()
    groups = jax.nn.one_hot(batch.group_ids, num_groups)  # [B, T, groups]
    aux = {
        "weight": weight,
        "correct": (hits * batch.loss_weights).sum(),
        "group_loss": jnp.einsum("BT,BTg->g", token_loss, groups),
        "group_weight": jnp.einsum("BT,BTg->g", batch.loss_weights, groups),
    }
    total = weight if total_weight is None else total_weight
    # A batch of padding alone has loss 0, not 0/0. Only ratios of weights matter otherwise, however small they are.
    return token_loss.sum() / jnp.where(total == 0, 1.0, total), aux


def cross_entropy(
    x: Float[Array, "B T D"], kernel: Float[Array, "V D"], targets: Int32[Array, "B T"], tile: int = TILE
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """−log softmax(x · kernelᵀ)[target] per token in fp32, and whether the target is the likeliest token.

    Args:
      x: normalised hidden states; the products are computed in their dtype and added up in fp32.
      kernel: the head, in any dtype.
      targets: below V.
      tile: most entries of the vocabulary at a time.
    """
    return _cross_entropy(x, kernel, targets, _num_tiles(kernel.shape[0], tile))


def _num_tiles(vocab: int, tile: int) -> int:
    """The fewest tiles of at most ``tile`` entries into which every shard of the vocabulary divides."""
    here = vocab // axis_size("vocab")
    return next(n for n in range(-(-vocab // tile), here + 1) if here % n == 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _cross_entropy(x: jax.Array, kernel: jax.Array, targets: jax.Array, tiles: int) -> tuple[jax.Array, jax.Array]:
    (losses, hits), _ = _forward(x, kernel, targets, tiles)
    return losses, hits


def _forward(x: jax.Array, kernel: jax.Array, targets: jax.Array, tiles: int):
    def body(carry, tile):
        largest, total, picked, best = carry
        W, first = tile
        logits = _logits(x, W)  # [B, T, s, v]
        top = logits.max((2, 3))
        # The first of equal logits counts, as argmax has it; tiles come in the order of the ids within a shard.
        entry = first[:, None] + jnp.arange(W.shape[1])  # [s, v]
        winner = jnp.where(logits == top[..., None, None], entry, kernel.shape[0]).min((2, 3))
        best = jnp.where(top > largest, winner, jnp.where(top == largest, jnp.minimum(best, winner), best))
        new = jnp.maximum(largest, top)
        total = total * jnp.exp(largest - new) + jnp.exp(logits - new[..., None, None]).sum((2, 3))
        picked += jnp.where(entry == targets[..., None, None], logits, 0.0).sum((2, 3))
        return (new, total, picked, best), logits if tiles == 1 else None

    like = jnp.zeros(targets.shape, jnp.float32)
    start = (like - jnp.inf, like, like, jnp.full(targets.shape, kernel.shape[0], jnp.int32))
    (largest, total, picked, best), kept = jax.lax.scan(body, start, _tiles(kernel, x.dtype, tiles))
    normaliser = largest + jnp.log(total)
    return (normaliser - picked, best == targets), (x, kernel, targets, normaliser, kept)


def _backward(tiles: int, saved, cotangents):
    x, kernel, targets, normaliser, kept = saved
    scale = cotangents[0].astype(jnp.float32)  # of the losses; nothing flows back through the hits

    def body(dx, tile):
        (W, first), logits = tile
        logits = _logits(x, W) if logits is None else logits
        probabilities = jnp.exp(logits - normaliser[..., None, None])
        entry = first[:, None] + jnp.arange(W.shape[1])
        hit = entry == targets[..., None, None]
        dlogits = ((probabilities - hit) * scale[..., None, None]).astype(x.dtype)
        dx += jnp.einsum("BTsv,svD->BTD", dlogits, W, preferred_element_type=jnp.float32)
        # x first: on CPUs a transposed x costs less than a transposed dlogits.
        dW = jnp.einsum("BTD,BTsv->Dsv", x, dlogits, preferred_element_type=jnp.float32).transpose(1, 2, 0)
        # Here, not after the loop: a whole gradient of the table on every device would be summed and thrown away.
        return dx, constrain(dW.astype(kernel.dtype), "vocab", None, "embed")

    dx = constrain(jnp.zeros(x.shape, jnp.float32), "batch", "length", None)
    dx, dW = jax.lax.scan(body, dx, (_tiles(kernel, x.dtype, tiles), kept))  # [tiles, s, v, D]
    return dx.astype(x.dtype), dW.swapaxes(0, 1).reshape(kernel.shape), np.zeros(targets.shape, jax.dtypes.float0)


_cross_entropy.defvjp(_forward, _backward)


def _logits(x: jax.Array, W: jax.Array) -> jax.Array:
    return jnp.einsum("BTD,svD->BTsv", x, W, preferred_element_type=jnp.float32)


def _tiles(kernel: jax.Array, dtype: jnp.dtype, tiles: int) -> tuple[jax.Array, jax.Array]:
    """The head as tiles [tiles, s, v, D] of s shards of the vocabulary; and the first id of each part [tiles, s]."""
    V, D = kernel.shape
    shards = axis_size("vocab")
    v = V // (shards * tiles)
    # Cast, then gathered along D once: in the loop it would be gathered again for every tile.
    whole = constrain(kernel.astype(dtype), "vocab", None)
    cut = whole.reshape(shards, tiles, v, D).swapaxes(0, 1)
    first = jnp.arange(shards)[None] * (V // shards) + jnp.arange(tiles)[:, None] * v
    return constrain(cut, None, "vocab", None, None), first.astype(jnp.int32)
