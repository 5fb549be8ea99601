"""The projector: vision features to decoder embeddings, one token each (``mlp2x_gelu`` of the released code)."""

from __future__ import annotations

import jax
from flax import nnx
from jaxtyping import Array, Float

from phivision_jax.models.layers import Linear


class Projector(nnx.Module):
    """Two linear layers with an exact (erf) GELU between them, from width C of a (merged) feature to D."""

    def __init__(self, C: int, D: int, *, rngs: nnx.Rngs) -> None:
        self.fc1 = Linear("BMC,CD->BMD", (C, D), ("patch_embed", "projector"), bias=True, rngs=rngs)
        self.fc2 = Linear("BMC,CD->BMD", (D, D), ("projector", "embed"), bias=True, rngs=rngs)

    @jax.named_scope("projector")
    def __call__(self, features: Float[Array, "*B M C"]) -> Float[Array, "*B M D"]:
        # torch.nn.GELU() is the exact form, unlike the encoder's tanh approximation.
        return self.fc2(jax.nn.gelu(self.fc1(features), approximate=False))
