"""The whole model: patches → features → vision tokens → spliced into text → logits.

features = model.vision_features(batch)   # [B, R, P, C]
vision   = model.vision_tokens(batch)     # [B, M, D]
embeds   = model.embeds(batch)            # [B, T, D]  text and vision tokens in their columns
hidden   = model.hidden(batch)            # [B, T, D]  after the final norm
logits   = model(batch)                   # [B, T, V]  fp32
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from phivision_jax.batch import Batch
from phivision_jax.config import LoraConfig, ModelConfig
from phivision_jax.models import lora as adapters
from phivision_jax.models.phi4 import Phi4Decoder
from phivision_jax.models.projector import Projector
from phivision_jax.models.siglip2 import Siglip2Encoder
from phivision_jax.sharding import constrain

Params = dict[str, Any]
"""Parameters as nested plain dicts, the form at every jit boundary."""


class PhiVision(nnx.Module):
    """Phi-4-reasoning-vision.

    Args:
      config: the architecture.
      rngs: for the initial weights.
      dtype: of the computation; parameters are made in fp32, norms, softmax, angles and logits stay fp32.
      remat: what a decoder layer keeps for its backward pass (``models/remat.py``), ``vision_remat`` a vision block.
      lora: adapters to add, which change nothing until they are trained; None or rank 0: none.

    Raises:
      ValueError: for a policy that does not exist, or targets of ``lora`` that match nothing.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        remat: str = "none",
        vision_remat: str = "none",
        lora: LoraConfig | None = None,
    ) -> None:
        self.config = config
        self.vision = Siglip2Encoder(config.vision, rngs=rngs, dtype=dtype, remat=vision_remat)
        self.projector = Projector(config, rngs=rngs)
        self.decoder = Phi4Decoder(config.decoder, rngs=rngs, dtype=dtype, remat=remat)
        if lora is not None and lora.rank:
            adapters.add(self, lora, rngs)  # last, so that the weights are drawn as they are without

    def __call__(self, batch: Batch) -> Float[Array, "B T V"]:
        return self.decoder.lm_head(self.hidden(batch))

    def hidden(self, batch: Batch) -> Float[Array, "B T D"]:
        return self.decoder(self.embeds(batch), batch.positions, batch.span_end, batch.segment_ids)[0]

    def embeds(self, batch: Batch) -> Float[Array, "B T D"]:
        """Token embeddings, replaced by vision tokens where ``vision_index`` points at one."""
        # Cast first: vision tokens must not be rounded to the dtype in which the table happens to be kept.
        embeds = self.decoder.embed_tokens(batch.tokens).astype(self.decoder.dtype)
        if batch.patches.shape[2] == 0:  # a batch of text: nothing to splice, and known when tracing
            return embeds
        return splice(embeds, self.vision_tokens(batch), batch.vision_index)

    def vision_tokens(self, batch: Batch) -> Float[Array, "B M D"]:
        """Features, merged by the batch's table (if it has one), through the projector."""
        B, R, P = batch.patch_segments.shape
        features = self.vision_features(batch)
        if batch.merge_index is not None and batch.merge_weight is not None:
            features = features.reshape(B, R * P, features.shape[-1])
            features = constrain(features, "batch", None, None)  # a table names any of them
            return self.projector(merge_features(features, batch.merge_index, batch.merge_weight))
        # Each part of the row projects its own vision rows; the splice then needs the tokens of all.
        tokens = constrain(self.projector(features), "batch", "vision_rows", None, None)
        return constrain(tokens.reshape(B, R * P, tokens.shape[-1]), "batch", None, None)

    def vision_features(self, batch: Batch) -> Float[Array, "B R P C"]:
        """Features of every patch, before the projector (the released code's ``hidden_states[-2]``)."""
        B, R, P = batch.patch_segments.shape
        if P == 0:
            return jnp.zeros((B, R, P, self.config.vision.hidden_size), self.vision.dtype)
        return self.vision(batch.patches, batch.patch_segments, batch.patch_coords, batch.patch_grid)

    def split(self) -> tuple[nnx.GraphDef, Params]:
        """The model as (static structure, plain dict of parameters); ``merge`` is the inverse."""
        graphdef, state = nnx.split(self, nnx.Param)
        return graphdef, nnx.to_pure_dict(state)


def merge(graphdef: nnx.GraphDef, params: Mapping[str, Any]) -> PhiVision:
    """The model again, around these parameters (arrays, tracers or ShapeDtypeStructs)."""
    return nnx.merge(graphdef, dict(params))


def abstract(
    config: ModelConfig,
    *,
    dtype: DTypeLike = jnp.float32,
    remat: str = "none",
    vision_remat: str = "none",
    lora: LoraConfig | None = None,
) -> tuple[nnx.GraphDef, nnx.State]:
    """Structure and abstract parameters of a model, logical axes included; allocates nothing."""
    model = nnx.eval_shape(
        lambda: PhiVision(config, rngs=nnx.Rngs(0), dtype=dtype, remat=remat, vision_remat=vision_remat, lora=lora)
    )
    return nnx.split(model, nnx.Param)


def splice(
    embeds: Float[Array, "B T D"], vision: Float[Array, "B M D"], vision_index: Int32[Array, "B T"]
) -> Float[Array, "B T D"]:
    """Column t becomes vision token ``vision_index[t]`` of its own row, or stays text where that is −1.

    tokens        u  ▢  ▢  a        vision_index  -1  0  1  -1        out  E[u] v[0] v[1] E[a]
    """
    out = jnp.where(vision_index[..., None] >= 0, _land(vision, vision_index).astype(embeds.dtype), embeds)
    return constrain(out, "batch", "length", None)


@jax.custom_vjp
def _land(vision: Float[Array, "B M D"], vision_index: Int32[Array, "B T"]) -> Float[Array, "B T D"]:
    """Each column's vision token; what stands at −1 means nothing, and nothing flows back from there.

    A token lands once at most, so its gradient is picked up from where it has landed. Left to itself, the transpose of
    a gather is a scatter: on a TPU a sort, a gather of all columns into that order, and then the scatter.
    """
    return jnp.take_along_axis(vision, jnp.maximum(vision_index, 0)[..., None], axis=1)


def _land_forward(vision: jax.Array, vision_index: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _land(vision, vision_index), (vision_index, jnp.arange(vision.shape[1], dtype=jnp.int32))


def _land_backward(saved: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, None]:
    vision_index, tokens = saved
    columns = jnp.arange(vision_index.shape[1], dtype=jnp.int32)
    column = jnp.where(vision_index[:, None] == tokens[:, None], columns, -1).max(-1)  # [B, M]; -1: nowhere
    picked = jnp.take_along_axis(gradient, jnp.maximum(column, 0)[..., None], axis=1)
    return jnp.where(column[..., None] >= 0, picked, 0), None


_land.defvjp(_land_forward, _land_backward)


def merge_features(
    features: Float[Array, "B RP C"], index: Int32[Array, "B M G K"], weight: Float[Array, "B M G K"]
) -> Float[Array, "B M GC"]:
    """Vision token m = concatenation over g of Σₖ weight·feature[index]; index −1 contributes zero.

    Stitching tiles, area pooling, S² channels and space-to-channel are all such a table, made on the host.
    """
    B, M, G, K = index.shape
    weight = jnp.where(index >= 0, weight, 0.0).astype(features.dtype)
    merged = jnp.zeros((B, M, G, features.shape[-1]), features.dtype)
    for k in range(K):  # one gather at a time: K features per token are never held together
        rows = jnp.maximum(index[..., k], 0).reshape(B, M * G, 1)
        picked = jnp.take_along_axis(features, rows, axis=1).reshape(B, M, G, -1)
        merged += picked * weight[..., k, None]
    return merged.reshape(B, M, -1)
