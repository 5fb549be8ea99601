"""The loss: mean cross-entropy over the weighted target tokens of a batch, without ever holding the logits.

Logits of a row of 8,192 tokens over 100,352 entries are 3.3 GB in fp32, more than everything else a layer keeps. So the
head is applied to a tile of the vocabulary at a time:

    for each tile W [v, D]     logits [B, T, v] = x · W         forward: largest so far, Σ exp, the target's logit
    once more, backward        p = softmax − target             dx += p · W,  dW = p · x

The table is gathered over fsdp once for the forward pass and once for the backward pass, before the loop; the gradient
of a tile is scattered to its owners as soon as it is made. Where the vocabulary is split over ``tensor``, a tile takes
an equal part of every shard.

Images and prompts have no loss, and so need no logits. Where no row of a batch has more than T / ``SHARE`` columns that
count, those are picked up first, and the head is applied to so many columns of each row:

    counted     0 0 0 0 1 0 0 1        T = 8, at most 2 of them in any row:      x[:, [4, 7]]

Not on TPUs: a second size of the head is a large part of what their compiler has to do for a whole step, and in the
batches of a pod there is nearly always a row that is all text.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int32, Shaped

from phivision_jax.batch import Batch
from phivision_jax.models.phivision import PhiVision
from phivision_jax.sharding import axis_size, constrain

TILE = 8192
"""Most vocabulary entries of a tile: large enough for the matrix units, small enough that its logits are cheap."""

SHARE = 4
"""One column in so many: more than that hold a loss in few batches of questions about images (the design's mix has an
answer in 15 % of its columns), and a row of text alone fills any share that is worth a program of its own."""

type _Tiles = tuple[Float[Array, "*tiles u v D"], Int32[Array, "*tiles u"]]
"""Of the head, and the first id of each part of it."""

type _Sums = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


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
    kernel, counted = model.decoder.lm_head.kernel[...], batch.loss_weights != 0
    losses, hits = cross_entropy(model.hidden(batch), kernel, batch.targets, counted)
    with jax.named_scope("loss"):
        token_loss = losses * batch.loss_weights  # [B, T]
        weight = batch.loss_weights.sum()
        groups = jax.nn.one_hot(batch.group_ids, num_groups)  # [B, T, g]
        aux = {
            "weight": weight,
            "correct": (hits * batch.loss_weights).sum(),
            "group_loss": jnp.einsum("BT,BTg->g", token_loss, groups),
            "group_weight": jnp.einsum("BT,BTg->g", batch.loss_weights, groups),
        }
        total = weight if total_weight is None else total_weight
        # A batch of padding alone has loss 0, not 0/0. Only ratios of weights matter otherwise, however small they are.
        return token_loss.sum() / jnp.where(total == 0, 1.0, total), aux


@jax.named_scope("loss")
def cross_entropy(
    x: Float[Array, "B T D"],
    kernel: Float[Array, "V D"],
    targets: Int32[Array, "B T"],
    counted: Bool[Array, "B T"],
    tile: int = TILE,
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """−log softmax(x · kernelᵀ)[target] per token in fp32, and whether the target is the likeliest token.

    Args:
      x: normalised hidden states; the products are computed in their dtype and added up in fp32.
      kernel: the head, in any dtype.
      targets: below V.
      counted: the columns that are asked for: elsewhere the loss is 0 and no hit, and x gets no gradient. A column of x
        that is not finite may spoil the kernel's gradient all the same.
      tile: most entries of the vocabulary at a time.
    """
    return _cross_entropy(x, kernel, targets, counted, _num_tiles(kernel.shape[0], tile))


def _num_tiles(vocab: int, tile: int) -> int:
    """The fewest tiles of at most ``tile`` entries into which every shard of the vocabulary divides."""
    here = vocab // axis_size("vocab")
    return next(n for n in range(-(-vocab // tile), here + 1) if here % n == 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _cross_entropy(
    x: jax.Array, kernel: jax.Array, targets: jax.Array, counted: jax.Array, tiles: int
) -> tuple[jax.Array, jax.Array]:
    return _forward(x, kernel, targets, counted, tiles)[0]


def _forward(
    x: jax.Array, kernel: jax.Array, targets: jax.Array, counted: jax.Array, tiles: int
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
    cut = _tiles(kernel, x.dtype, tiles)

    def of(columns: _Columns) -> tuple[jax.Array, ...]:
        return tuple(columns.spread(y) for y in _losses(columns.take(x), columns.take(targets), cut))

    losses, hits, normaliser = _on_counted(of, counted)
    # Infinite where nothing counts: by a finite one exp of the logits could overflow there, and ∞ · 0 is no number.
    return (losses, hits), (x, kernel, targets, counted, jnp.where(counted, normaliser, jnp.inf))


def _backward(
    tiles: int, saved: tuple[jax.Array, ...], cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, None, None]:
    x, kernel, targets, counted, normaliser = saved
    cut = _tiles(kernel, x.dtype, tiles)
    # Of the losses; nothing flows back through the hits.
    scale = jnp.where(counted, cotangents[0].astype(jnp.float32), 0)

    def of(columns: _Columns) -> tuple[jax.Array, jax.Array]:
        some_x, some_targets, *scalars = (columns.take(a) for a in (x, targets, normaliser, scale))
        dx, dW = _gradients(some_x, some_targets, scalars[0], scalars[1], cut, kernel.dtype)
        return columns.spread(dx), dW

    dx, dW = _on_counted(of, counted)  # [tiles, u, v, D]
    return dx, rearrange(dW, "tiles u v D -> (u tiles v) D"), None, None


_cross_entropy.defvjp(_forward, _backward)


@dataclasses.dataclass(frozen=True)
class _Columns:
    """The first ``size`` counted columns of every row, in their order; if ``size`` is T, all columns."""

    counted: Bool[Array, "B T"]
    size: int

    def take(self, x: Shaped[Array, "B T ..."]) -> Shaped[Array, "B size ..."]:
        """Zeros after a row's last counted column."""
        if self.size == x.shape[1]:
            return x
        slot = jnp.arange(1, self.size + 1)
        column = (self.counted.cumsum(1)[:, None] < slot[:, None]).sum(-1)  # T where a row has no such column
        return _pick(x, column)

    def spread(self, y: Shaped[Array, "B size ..."]) -> Shaped[Array, "B T ..."]:
        """Zeros in columns that are not counted."""
        if self.size != self.counted.shape[1]:
            y = _pick(y, self.counted.cumsum(1) - 1)
        return jnp.where(self.counted.reshape(*self.counted.shape, *[1] * (y.ndim - 2)), y, jnp.zeros((), y.dtype))


def _pick(x: Shaped[Array, "B T ..."], column: Int32[Array, "B S"]) -> Shaped[Array, "B S ..."]:
    """Zeros for columns beyond the row."""
    column = column.reshape(*column.shape, *[1] * (x.ndim - 2))
    return jnp.take_along_axis(x, column, axis=1, mode="fill", fill_value=0)


def _on_counted[R](run: Callable[[_Columns], R], counted: Bool[Array, "B T"]) -> R:
    """``run`` on a share of the columns if it holds every row's, else on all; the same on all devices."""
    few, T = (counted.shape[1] // n for n in (SHARE, 1))
    on_few, on_all = (functools.partial(run, _Columns(counted, size)) for size in (few, T))
    if few == 0:
        return on_all()
    either = functools.partial(jax.lax.cond, counted.sum(1).max() <= few, on_few, on_all)
    return jax.lax.platform_dependent(tpu=on_all, default=either)


def _losses(x: Float[Array, "B T D"], targets: Int32[Array, "B T"], cut: _Tiles) -> tuple[jax.Array, ...]:
    """Loss, whether the target is the likeliest, and the logits' log Σ exp, [B, T] each."""

    def body(carry: _Sums, tile: _Tiles) -> tuple[_Sums, None]:
        largest, total, picked, beaten = carry
        W, first = tile
        logits, target = _logits(x, W), targets[..., None, None]  # [B, T, u, v]
        entry = first[:, None] + jnp.arange(W.shape[1])  # [u, v]
        top = logits.max((2, 3))
        # Of equal logits the first id counts, as argmax has it: is there one before the target's?
        earlier = ((logits == top[..., None, None]) & (entry < target)).any((2, 3))
        beaten = jnp.where(top > largest, earlier, beaten | (top == largest) & earlier)
        new = jnp.maximum(largest, top)
        total = total * jnp.exp(largest - new) + jnp.exp(logits - new[..., None, None]).sum((2, 3))
        picked += jnp.where(entry == target, logits, 0.0).sum((2, 3))
        return (new, total, picked, beaten), None

    like = jnp.zeros(targets.shape, jnp.float32)
    start = like - jnp.inf, like, like, jnp.zeros(targets.shape, bool)
    (largest, total, picked, beaten), _ = jax.lax.scan(body, start, cut)
    normaliser = largest + jnp.log(total)
    return normaliser - picked, (picked == largest) & ~beaten, normaliser


def _gradients(
    x: Float[Array, "B T D"],
    targets: Int32[Array, "B T"],
    normaliser: Float[Array, "B T"],
    scale: Float[Array, "B T"],
    cut: _Tiles,
    dtype: jnp.dtype,
) -> tuple[Float[Array, "B T D"], Float[Array, "tiles u v D"]]:
    """Of x, and of the head in ``dtype``; ``scale`` is that of the losses."""

    def body(dx: jax.Array, tile: _Tiles) -> tuple[jax.Array, jax.Array]:
        W, first = tile
        probabilities = jnp.exp(_logits(x, W) - normaliser[..., None, None])
        entry = first[:, None] + jnp.arange(W.shape[1])
        hit = entry == targets[..., None, None]
        dlogits = ((probabilities - hit) * scale[..., None, None]).astype(x.dtype)
        with jax.named_scope("head"):
            dx += jnp.einsum("BTuv,uvD->BTD", dlogits, W, preferred_element_type=jnp.float32)
            # x first: on CPUs a transposed x costs less than a transposed dlogits.
            dW = jnp.einsum("BTD,BTuv->Duv", x, dlogits, preferred_element_type=jnp.float32)
        # Here, not after the loop: a whole gradient of the table on every device would be summed and thrown away.
        return dx, constrain(rearrange(dW, "D u v -> u v D").astype(dtype), "vocab", None, "embed")

    dx, dW = jax.lax.scan(body, constrain(jnp.zeros(x.shape, jnp.float32), "batch", "length", None), cut)
    return dx.astype(x.dtype), dW


@jax.named_scope("head")
def _logits(x: jax.Array, W: jax.Array) -> jax.Array:
    return jnp.einsum("BTD,uvD->BTuv", x, W, preferred_element_type=jnp.float32)


@jax.named_scope("head")
def _tiles(kernel: jax.Array, dtype: jnp.dtype, tiles: int) -> _Tiles:
    """The head as tiles [tiles, u, v, D] of u shards of the vocabulary; and the first id of each part [tiles, u]."""
    V, shards = kernel.shape[0], axis_size("vocab")
    v = V // (shards * tiles)
    # Cast, then gathered along D once: in the loop it would be gathered again for every tile.
    whole = constrain(kernel.astype(dtype), "vocab", None)
    cut = rearrange(whole, "(u tiles v) D -> tiles u v D", u=shards, v=v)
    first = jnp.arange(shards)[None] * (V // shards) + jnp.arange(tiles)[:, None] * v
    return constrain(cut, None, "vocab", None, None), first.astype(jnp.int32)
