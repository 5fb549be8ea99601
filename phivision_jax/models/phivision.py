"""The complete model: patches → features → vision tokens → spliced into text → logits.

features = model.vision_features(batch)   # [B, R, P, C]
vision   = model.vision_tokens(batch)     # [B, M, D]
embeds   = model.embeds(batch)            # [B, T, D]  text and vision tokens at their positions
hidden   = model.hidden(batch)            # [B, T, D]  after the final norm
logits   = model(batch)                   # [B, T, V]  fp32
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from phivision_jax.batch import Batch
from phivision_jax.config import EARLY_FUSION, FIXED, NAFLEX, LoraConfig, ModelConfig
from phivision_jax.models import int8
from phivision_jax.models import lora as adapters
from phivision_jax.models.early_fusion import EarlyFusion
from phivision_jax.models.layers import Linear
from phivision_jax.models.phi4 import Phi4Decoder
from phivision_jax.models.siglip2 import Siglip2Encoder
from phivision_jax.sharding import constrain

WEIGHTS = ("int8",)
"""Forms of the matrices other than floating point (``models/int8.py``)."""

Params = dict[str, Any]
"""Parameters as nested plain dicts, the form at every jit boundary."""


class VisionSide(Protocol):
    """The vision side: an ``nnx.Module`` that turns a batch's patches into features.

    Another encoder implements this and gets a name in ``VISION_SIDES``; the projector's input width, merging and
    splicing follow from it.

    It may read ``patches``, ``patch_segments``, ``patch_coords`` and ``patch_grid``. Features of one image must not
    depend on others; those of padding (segment 0) are finite and never used. P is at least 1.
    """

    width: int
    """C, the channels of a feature: the projector's input is ``projector.merge_size`` of them."""

    def __call__(self, batch: Batch) -> Float[Array, "B R P C"]: ...


VISION_SIDES: dict[str, Callable[..., VisionSide]] = {
    NAFLEX: Siglip2Encoder,
    FIXED: Siglip2Encoder,
    EARLY_FUSION: EarlyFusion,
}
"""Implementations by ``VisionConfig.encoder``, constructed with a ``VisionConfig``, random state, the dtype of the
computation and of the features, and the policy of rematerialisation (``models/remat.py``)."""


class Projector(nnx.Module):
    """From width C of a (merged) vision feature to an embedding of width D: two linear layers, a GELU between them."""

    def __init__(self, C: int, D: int, *, rngs: nnx.Rngs) -> None:
        self.fc1 = Linear("BMC,CD->BMD", (C, D), ("patch_embed", "projector"), bias=True, rngs=rngs)
        self.fc2 = Linear("BMC,CD->BMD", (D, D), ("projector", "embed"), bias=True, rngs=rngs)

    @jax.named_scope("projector")
    def __call__(self, features: Float[Array, "*B M C"]) -> Float[Array, "*B M D"]:
        # torch.nn.GELU() is the exact form, unlike the encoder's tanh approximation.
        return self.fc2(jax.nn.gelu(self.fc1(features), approximate=False))


class PhiVision(nnx.Module):
    """Phi-4-reasoning-vision.

    Args:
      config: the architecture.
      rngs: for the initial weights.
      dtype: of the computation; parameters are fp32, and so are norms, softmax, angles and logits.
      remat: rematerialisation policy of decoder layers (``models/remat.py``), ``vision_remat`` that of vision blocks.
      lora: adapters to add, which change nothing until they are trained; None or rank 0 for none.
      weights: form of the matrices, "int8" for a model that is not trained; None for floating point.

    Raises:
      ValueError: for an unknown encoder, policy or form of weights, ``lora.targets`` that match nothing, or adapters
        on int8.
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
        weights: str | None = None,
    ) -> None:
        if weights not in (None, *WEIGHTS) or (weights and lora is not None and lora.rank):
            problem = "does not exist; choose int8 or None" if weights not in WEIGHTS else "cannot have adapters"
            raise ValueError(f"weights {weights!r} {problem}")
        self.config = config
        name = config.vision.encoder
        if name not in VISION_SIDES:
            raise ValueError(f"vision.encoder {name!r} does not exist; choose one of {', '.join(VISION_SIDES)}")
        self.vision = VISION_SIDES[name](config.vision, rngs=rngs, dtype=dtype, remat=vision_remat)
        merged_width, width = config.projector.merge_size * self.vision.width, config.decoder.hidden_size
        self.projector = Projector(merged_width, width, rngs=rngs) if config.vision.has_blocks else None
        self.decoder = Phi4Decoder(config.decoder, rngs=rngs, dtype=dtype, remat=remat)
        if lora is not None and lora.rank:
            adapters.add(self, lora, rngs)  # last, so that the other weights do not depend on them
        if weights:
            int8.quantise_model(self)

    def __call__(self, batch: Batch) -> Float[Array, "B T V"]:
        return self.decoder.lm_head(self.hidden(batch))

    def hidden(self, batch: Batch) -> Float[Array, "B T D"]:
        return self.decoder(self.embeds(batch), batch.positions, batch.span_end, batch.segment_ids)

    def embeds(self, batch: Batch) -> Float[Array, "B T D"]:
        """Token embeddings, replaced by vision tokens where ``vision_index`` points at one."""
        # Cast first: vision tokens must not be rounded to the dtype in which the table happens to be stored.
        embeds = self.decoder.embed_tokens(batch.tokens).astype(self.decoder.dtype)
        if batch.patches.shape[2] == 0:  # a batch of text only: nothing to splice, known at trace time
            return embeds
        return splice(embeds, self.vision_tokens(batch), batch.vision_index)

    def vision_tokens(self, batch: Batch) -> Float[Array, "B M D"]:
        """Projected features, merged first if the batch has a merge table.

        Raises:
          ValueError: when the merge table joins another number of features than the projector takes.
        """
        wanted = self.config.projector.merge_size
        joined = 1 if batch.merge_index is None else batch.merge_index.shape[2]
        if joined != wanted:
            problem = f"the batch joins {joined} features to a vision token, but projector.merge_size is {wanted}"
            raise ValueError(f"{problem}; make batches with the layout of this model ({self.config.image_layout!r})")
        features, project = self.vision_features(batch), self.projector or (lambda features: features)
        if batch.merge_index is not None and batch.merge_weight is not None:
            features = constrain(rearrange(features, "B R P C -> B (R P) C"), "batch", None, None)
            return project(merge_features(features, batch.merge_index, batch.merge_weight))
        # Each shard of the row projects its own vision rows; the splice then needs the tokens of all.
        tokens = constrain(project(features), "batch", "vision_rows", None, None)
        return constrain(rearrange(tokens, "B R P D -> B (R P) D"), "batch", None, None)

    @jax.named_scope("vision")
    def vision_features(self, batch: Batch) -> Float[Array, "B R P C"]:
        """Features of every patch, before the projector (the released code's ``hidden_states[-2]``)."""
        if batch.patches.shape[2] == 0:
            return jnp.zeros((*batch.patch_segments.shape, self.vision.width), self.decoder.dtype)
        if (found := batch.patches.shape[-1]) != (numbers := self.config.vision.patch_dim):
            problem = f"patches of {found} numbers, but vision.patch_size {self.config.vision.patch_size} has {numbers}"
            raise ValueError(f"the batch has {problem}; make batches with this model's configuration")
        return self.vision(batch)

    def split(self) -> tuple[nnx.GraphDef, Params]:
        """The model as (static structure, plain dict of parameters); ``merge`` is the inverse."""
        graphdef, state = nnx.split(self, nnx.Param)
        return graphdef, nnx.to_pure_dict(state)


def merge(graphdef: nnx.GraphDef, params: Mapping[str, Any]) -> PhiVision:
    """Rebuild the model from its structure and parameters (arrays, tracers or ShapeDtypeStructs)."""
    return nnx.merge(graphdef, dict(params))


def abstract(config: ModelConfig, **options: Any) -> tuple[nnx.GraphDef, nnx.State]:
    """Structure and abstract parameters, logical axes included, of a model with ``PhiVision``'s options.

    Allocates nothing.
    """
    return nnx.split(nnx.eval_shape(lambda: PhiVision(config, rngs=nnx.Rngs(0), **options)), nnx.Param)


@jax.named_scope("splice")
def splice(
    embeds: Float[Array, "B T D"], vision: Float[Array, "B M D"], vision_index: Int32[Array, "B T"]
) -> Float[Array, "B T D"]:
    """Replace position t by vision token ``vision_index[t]`` of its row, unless that is −1.

    tokens        u  ▢  ▢  a        vision_index  -1  0  1  -1        out  E[u] v[0] v[1] E[a]
    """
    out = jnp.where(vision_index[..., None] >= 0, _gather_tokens(vision, vision_index).astype(embeds.dtype), embeds)
    return constrain(out, "batch", "length", None)


@jax.custom_vjp
def _gather_tokens(vision: Float[Array, "B M D"], vision_index: Int32[Array, "B T"]) -> Float[Array, "B T D"]:
    """Gather with a custom VJP: each token is used at most once, so the backward pass is a gather, not a scatter-add.

    The result is arbitrary where the index is −1, and no gradient flows back from there. A scatter-add would be slow on
    a TPU: a sort, a gather of all positions into that order, and then the scatter.
    """
    return jnp.take_along_axis(vision, jnp.maximum(vision_index, 0)[..., None], axis=1)


def _gather_forward(vision: jax.Array, vision_index: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _gather_tokens(vision, vision_index), (vision_index, jnp.arange(vision.shape[1], dtype=jnp.int32))


def _gather_backward(saved: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, None]:
    vision_index, tokens = saved
    positions = jnp.arange(vision_index.shape[1], dtype=jnp.int32)
    used_at = jnp.where(vision_index[:, None] == tokens[:, None], positions, -1).max(-1)  # [B, M]; -1: nowhere
    picked = jnp.take_along_axis(gradient, jnp.maximum(used_at, 0)[..., None], axis=1)
    return jnp.where(used_at[..., None] >= 0, picked, 0), None


_gather_tokens.defvjp(_gather_forward, _gather_backward)


@jax.named_scope("merge")
def merge_features(
    features: Float[Array, "B RP C"], index: Int32[Array, "B M n k"], weight: Float[Array, "B M n k"]
) -> Float[Array, "B M nC"]:
    """Vision token m = concatenation over n of Σₖ weight·feature[index]; index −1 contributes zero.

    Stitching tiles, area pooling, S² channels and space-to-channel are all such a table, made on the host.
    """
    M = index.shape[1]
    weight = jnp.where(index >= 0, weight, 0.0).astype(features.dtype)
    merged = jnp.zeros((*index.shape[:3], features.shape[-1]), features.dtype)
    for k in range(index.shape[3]):  # one gather at a time: the k terms of a token are never held together
        rows = rearrange(jnp.maximum(index[..., k], 0), "B M n -> B (M n) 1")
        picked = rearrange(jnp.take_along_axis(features, rows, axis=1), "B (M n) C -> B M n C", M=M)
        merged += picked * weight[..., k, None]
    return rearrange(merged, "B M n C -> B M (n C)")
