"""The loss: mean cross-entropy over the weighted target tokens of a batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from phivision_jax.batch import Batch
from phivision_jax.models.phivision import PhiVision


def cross_entropy(logits: Float[Array, "... V"], targets: Int32[Array, ...]) -> Float[Array, ...]:
    """−log softmax(logits)[target] in fp32, per token."""
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def batch_loss(model: PhiVision, batch: Batch, num_groups: int = 1) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean loss over all weighted targets of the global batch (never a mean of rows' means).

    Returns:
      The scalar loss, and sums to log: ``weight`` (), ``correct`` (), ``group_loss`` and ``group_weight``
      [num_groups] by ``batch.group_ids``.
    """
    logits = model(batch)
    token_loss = cross_entropy(logits, batch.targets) * batch.loss_weights  # [B, T]
    weight = batch.loss_weights.sum()
    correct = ((logits.argmax(-1) == batch.targets) * batch.loss_weights).sum()
    groups = jax.nn.one_hot(batch.group_ids, num_groups)  # [B, T, groups]
    aux = {
        "weight": weight,
        "correct": correct,
        "group_loss": jnp.einsum("BT,BTg->g", token_loss, groups),
        "group_weight": jnp.einsum("BT,BTg->g", batch.loss_weights, groups),
    }
    # A batch of padding alone has loss 0, not 0/0.
    return token_loss.sum() / jnp.maximum(weight, 1.0), aux
