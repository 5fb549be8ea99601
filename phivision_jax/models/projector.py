"""The projector: vision features to decoder embeddings, one token each (``mlp2x_gelu`` of the released code)."""

from __future__ import annotations

import jax
from flax import nnx
from jaxtyping import Array, Float

from phivision_jax.config import ModelConfig
from phivision_jax.models.layers import Linear


class Projector(nnx.Module):
    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs) -> None:
        C, D = cfg.projector.merge_size * cfg.vision.hidden_size, cfg.decoder.hidden_size
        self.fc1 = Linear((C,), (D,), ("patch_embed", "projector"), bias=True, rngs=rngs)
        self.fc2 = Linear((D,), (D,), ("projector", "embed"), bias=True, rngs=rngs)

    def __call__(self, features: Float[Array, "*B M GC"]) -> Float[Array, "*B M D"]:
        # torch.nn.GELU() is the exact one (erf), unlike the encoder's tanh form.
        return self.fc2(jax.nn.gelu(self.fc1(features), approximate=False))
