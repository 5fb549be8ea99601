"""The loss: mean cross-entropy over the weighted target tokens of a batch, without materializing the logits.

Logits of a row of 8,192 tokens over 100,352 entries are 3.3 GB in fp32, more than everything else that a layer keeps.
So the head is applied to one tile of the vocabulary at a time:

    for each tile W [v, D]     logits [B, T, v] = x · W         forward: running maximum, Σ exp, the target's logit
    again, backward            p = softmax − target             dx += p · W,  dW = p · x

The head is gathered over fsdp once per pass, before the loop; the gradient of a tile is scattered to its owners as soon
as it is computed. If the vocabulary is sharded over ``tensor``, a tile takes an equal part of every shard.

Images and prompts have no loss, and so need no logits. If no row of a batch has more than T / ``FEW`` positions with a
loss, these are gathered first, and the head is applied to T / ``FEW`` positions of each row:

    counted     0 0 0 0 1 0 0 1        T = 8, FEW = 4, at most 2 in any row:      x[:, [4, 7]]

Not on TPUs: a second size of the head would add much to the compilation of a step, and a batch of a pod nearly always
has a text-only row.
"""

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
"""Maximum vocabulary entries of a tile: large enough for the matrix units, small enough that its logits are cheap."""

FEW = 4
"""Apply the head to T / 4 positions when no row has more loss positions than that: typical of visual question answering
(in the recipe's mixture 15 % of the positions have a loss); a text-only row exceeds any smaller share too."""

type _Tiles = tuple[Float[Array, "*tiles u v D"], Int32[Array, "*tiles u"]]
"""Tiles of the head, and the first token id of each shard's part of them."""

type _Sums = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def batch_loss(
    model: PhiVision, batch: Batch, num_groups: int = 1, total_weight: jax.Array | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean loss over all weighted targets of the global batch (never a mean of rows' means).

    Args:
      total_weight: divisor of the sum; default: the batch's own weights. For a part of a larger batch, the weight of
        that batch, so that losses and gradients of its parts add up to its own.

    Returns:
      The scalar loss, and sums to log: ``weight`` (), ``correct`` (), ``group_loss`` and ``group_weight``
      [num_groups] by ``batch.group_ids``.

    Raises:
      ValueError: for a model with int8 weights.
    """
    if model.decoder.lm_head.scale is not None:
        raise ValueError("a model with int8 weights has no loss and cannot be trained: load it without weights='int8'")
    kernel, counted, hidden = model.decoder.lm_head.kernel[...], batch.loss_weights != 0, model.hidden(batch)
    with jax.named_scope("loss"):
        losses, hits = cross_entropy(hidden, kernel, batch.targets, counted)
        weights, groups = batch.loss_weights, jax.nn.one_hot(batch.group_ids, num_groups)  # [B, T], [B, T, g]
        token_loss, weight = losses * weights, weights.sum()
        sums = {"weight": weight, "correct": (hits * weights).sum()}
        for name, values in (("group_loss", token_loss), ("group_weight", weights)):
            sums[name] = jnp.einsum("BT,BTg->g", values, groups)
        total = weight if total_weight is None else total_weight
        # A batch of padding has loss 0, not 0/0. Otherwise only ratios of weights matter, however small they are.
        return token_loss.sum() / jnp.where(total == 0, 1.0, total), sums


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy(
    x: Float[Array, "B T D"],
    kernel: Float[Array, "V D"],
    targets: Int32[Array, "B T"],
    counted: Bool[Array, "B T"],
    tile: int = TILE,
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """−log softmax(x · kernelᵀ)[target] per token in fp32, and whether the target is the most likely token.

    Args:
      x: normalized hidden states; products are computed in their dtype and summed in fp32.
      kernel: the head, in any dtype.
      targets: token ids, below V.
      counted: positions to compute. Elsewhere the loss is 0 and no hit, and x gets no gradient; a value of x there that
        is not finite may still spoil the kernel's gradient.
      tile: maximum vocabulary entries at a time.
    """
    return _forward(x, kernel, targets, counted, tile)[0]


def _num_tiles(vocab: int, tile: int) -> int:
    """The smallest number of tiles of at most ``tile`` entries that divides every shard of the vocabulary."""
    shard = vocab // axis_size("vocab")
    return next(n for n in range(-(-vocab // tile), shard + 1) if shard % n == 0)


def _forward(
    x: jax.Array, kernel: jax.Array, targets: jax.Array, counted: jax.Array, tile: int
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
    tiles = _tiles(kernel, x.dtype, tile)

    def losses_at(positions: _Positions) -> tuple[jax.Array, ...]:
        return tuple(positions.scatter(y) for y in _losses(positions.gather(x), positions.gather(targets), tiles))

    losses, hits, normalizer = _on_counted(losses_at, counted)
    # Infinite where nothing counts: with a finite one exp of the logits could overflow there, and ∞ · 0 is NaN.
    return (losses, hits), (x, kernel, targets, counted, jnp.where(counted, normalizer, jnp.inf))


def _backward(
    tile: int, saved: tuple[jax.Array, ...], cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, None, None]:
    x, kernel, targets, counted, normalizer = saved
    tiles = _tiles(kernel, x.dtype, tile)
    # The cotangent of the losses; the hits have no gradient.
    scale = jnp.where(counted, cotangents[0].astype(jnp.float32), 0)

    def gradients_at(positions: _Positions) -> tuple[jax.Array, jax.Array]:
        some_x, some_targets, *scalars = (positions.gather(a) for a in (x, targets, normalizer, scale))
        dx, dW = _gradients(some_x, some_targets, scalars[0], scalars[1], tiles, kernel.dtype)
        return positions.scatter(dx), dW

    dx, dW = _on_counted(gradients_at, counted)  # [tiles, u, v, D]
    return dx, rearrange(dW, "tiles u v D -> (u tiles v) D"), None, None


cross_entropy.defvjp(_forward, _backward)


@dataclasses.dataclass(frozen=True)
class _Positions:
    """The first ``size`` counted positions of every row, in order; with ``size`` T, all positions."""

    counted: Bool[Array, "B T"]
    size: int

    def gather(self, x: Shaped[Array, "B T ..."]) -> Shaped[Array, "B size ..."]:
        """The values at these positions; zeros after a row's last one."""
        if self.size == x.shape[1]:
            return x
        slot = jnp.arange(1, self.size + 1)
        index = (self.counted.cumsum(1)[:, None] < slot[:, None]).sum(-1)  # T where a row has no such position
        return _pick(x, index)

    def scatter(self, y: Shaped[Array, "B size ..."]) -> Shaped[Array, "B T ..."]:
        """The inverse of ``gather``; zeros where not counted."""
        if self.size != self.counted.shape[1]:
            y = _pick(y, self.counted.cumsum(1) - 1)
        return jnp.where(self.counted.reshape(*self.counted.shape, *[1] * (y.ndim - 2)), y, jnp.zeros((), y.dtype))


def _pick(x: Shaped[Array, "B T ..."], index: Int32[Array, "B S"]) -> Shaped[Array, "B S ..."]:
    """Values at these positions; zeros beyond the row."""
    index = index.reshape(*index.shape, *[1] * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1, mode="fill", fill_value=0)


def _on_counted[R](run: Callable[[_Positions], R], counted: Bool[Array, "B T"]) -> R:
    """``run`` on T / ``FEW`` positions if these are enough for every row, else on all; the same on all devices."""
    few, T = (counted.shape[1] // n for n in (FEW, 1))
    on_few, on_all = (functools.partial(run, _Positions(counted, size)) for size in (few, T))
    if few == 0:
        return on_all()
    either = functools.partial(jax.lax.cond, counted.sum(1).max() <= few, on_few, on_all)
    return jax.lax.platform_dependent(tpu=on_all, default=either)


def _losses(x: Float[Array, "B T D"], targets: Int32[Array, "B T"], tiles: _Tiles) -> tuple[jax.Array, ...]:
    """Loss, whether the target is the most likely token, and log Σ exp of the logits, [B, T] each."""

    def body(carry: _Sums, tile: _Tiles) -> tuple[_Sums, None]:
        largest, total, picked, beaten = carry
        W, first = tile
        logits, target = _logits(x, W), targets[..., None, None]  # [B, T, u, v]
        entry = first[:, None] + jnp.arange(W.shape[1])  # [u, v]
        top = logits.max((2, 3))
        # Of equal logits the first id wins, as in argmax: is there one before the target's?
        earlier = ((logits == top[..., None, None]) & (entry < target)).any((2, 3))
        beaten = jnp.where(top > largest, earlier, beaten | (top == largest) & earlier)
        new = jnp.maximum(largest, top)
        total = total * jnp.exp(largest - new) + jnp.exp(logits - new[..., None, None]).sum((2, 3))
        picked += jnp.where(entry == target, logits, 0.0).sum((2, 3))
        return (new, total, picked, beaten), None

    like = jnp.zeros(targets.shape, jnp.float32)
    start = like - jnp.inf, like, like, jnp.zeros(targets.shape, bool)
    (largest, total, picked, beaten), _ = jax.lax.scan(body, start, tiles)
    normalizer = largest + jnp.log(total)
    return normalizer - picked, (picked == largest) & ~beaten, normalizer


def _gradients(
    x: jax.Array, targets: jax.Array, normalizer: jax.Array, scale: jax.Array, tiles: _Tiles, dtype: jnp.dtype
) -> tuple[Float[Array, "B T D"], Float[Array, "tiles u v D"]]:
    """Gradients of x [B, T, D], and of the head in ``dtype``; ``scale`` [B, T] is the cotangent of the losses."""

    def body(dx: jax.Array, tile: _Tiles) -> tuple[jax.Array, jax.Array]:
        W, first = tile
        probabilities = jnp.exp(_logits(x, W) - normalizer[..., None, None])
        entry = first[:, None] + jnp.arange(W.shape[1])
        hit = entry == targets[..., None, None]
        dlogits = ((probabilities - hit) * scale[..., None, None]).astype(x.dtype)
        with jax.named_scope("head"):
            dx += jnp.einsum("BTuv,uvD->BTD", dlogits, W, preferred_element_type=jnp.float32)
            # x first: on CPUs a transposed x costs less than a transposed dlogits.
            dW = jnp.einsum("BTD,BTuv->Duv", x, dlogits, preferred_element_type=jnp.float32)
        # Here, not after the loop: otherwise every device would sum a complete gradient of the head and discard most.
        return dx, constrain(rearrange(dW, "D u v -> u v D").astype(dtype), "vocab", None, "embed")

    dx, dW = jax.lax.scan(body, constrain(jnp.zeros(x.shape, jnp.float32), "batch", "length", None), tiles)
    return dx.astype(x.dtype), dW


@jax.named_scope("head")
def _logits(x: jax.Array, W: jax.Array) -> jax.Array:
    return jnp.einsum("BTD,uvD->BTuv", x, W, preferred_element_type=jnp.float32)


@jax.named_scope("head")
def _tiles(kernel: jax.Array, dtype: jnp.dtype, tile: int) -> _Tiles:
    """The head as tiles [tiles, u, v, D] over u shards of the vocabulary, and the first id of each part [tiles, u]."""
    V, shards, num_tiles = kernel.shape[0], axis_size("vocab"), _num_tiles(kernel.shape[0], tile)
    v = V // (shards * num_tiles)
    # Cast, then gathered along D once: inside the loop it would be gathered for every tile.
    gathered = constrain(kernel.astype(dtype), "vocab", None)
    tiles = rearrange(gathered, "(u tiles v) D -> tiles u v D", u=shards, v=v)
    first = jnp.arange(shards)[None] * (V // shards) + jnp.arange(num_tiles)[:, None] * v
    return constrain(tiles, None, "vocab", None, None), first.astype(jnp.int32)
