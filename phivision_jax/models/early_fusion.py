"""Early fusion: patches straight into the decoder's width, without a vision encoder.

    patch [P, patch²·3] ──linear──► [P, D]  +  position of the patch in its grid [P, D]  ──► vision token

The decoder's own layers then do the work of an encoder, as in Fuyu (Adept, 2023, which had a newline token in place of
positions) and EVE (arXiv 2406.11832). Positions come from a table that is resized to the grid, like SigLIP-2's. The
patches of an image see each other in the decoder: with ``image_attention="bidirectional"`` all of them, with "causal"
those before.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from phivision_jax.batch import Batch
from phivision_jax.config import VisionConfig
from phivision_jax.models.layers import Linear
from phivision_jax.models.siglip2 import PositionEmbedding, pixel_values
from phivision_jax.sharding import constrain


class EarlyFusion(nnx.Module):
    """The linear layer as a ``models.phivision.VisionSide``: its features are vision tokens, of the decoder's width.

    Args:
      cfg: ``hidden_size`` is the decoder's width; ``patch_size`` and ``num_positions`` are the other fields in use.
      dtype: of the computation and of the features.
      remat: has no effect, since there are no blocks.
    """

    def __init__(self, cfg: VisionConfig, *, rngs: nnx.Rngs, dtype: DTypeLike, remat: str) -> None:
        self.width, self.dtype = cfg.hidden_size, jnp.dtype(dtype)
        shape = cfg.patch_dim, cfg.hidden_size
        self.patch_embedding = Linear("BRPF,FC->BRPC", shape, (None, "embed"), bias=True, rngs=rngs)
        self.position_embedding = PositionEmbedding(cfg, rngs=rngs, axis="embed")

    def __call__(self, batch: Batch) -> Float[Array, "B R P C"]:
        x = self.patch_embedding(pixel_values(batch, self.dtype))
        x = x + self.position_embedding(batch.patch_coords, batch.patch_grid).astype(self.dtype)
        return constrain(x, "batch", "vision_rows", None, None)
