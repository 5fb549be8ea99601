"""The parts of SigLIP-2 that checkpoints carry but that never run: the last block, its post-norm and the pooling head.

They exist so that a model trained from random weights can be written in the released layout.
"""

from __future__ import annotations

from flax import nnx
from jax.nn.initializers import truncated_normal

from phivision_jax.config import VisionConfig
from phivision_jax.models.layers import LayerNorm, Linear, param
from phivision_jax.models.siglip2 import MLP, EncoderLayer


class PoolingAttention(nnx.Module):
    def __init__(self, cfg: VisionConfig, *, rngs: nnx.Rngs) -> None:
        C = cfg.hidden_size
        self.in_proj = Linear("BC,CF->BF", (C, 3 * C), ("patch_embed", None), bias=True, rngs=rngs)
        self.out_proj = Linear("BF,FC->BC", (C, C), (None, "patch_embed"), bias=True, rngs=rngs)


class PoolingHead(nnx.Module):
    def __init__(self, cfg: VisionConfig, *, rngs: nnx.Rngs) -> None:
        C = cfg.hidden_size
        self.probe = param(rngs, (1, 1, C), (None, None, "patch_embed"), truncated_normal(0.02))
        self.attention = PoolingAttention(cfg, rngs=rngs)
        self.layernorm = LayerNorm(C, "patch_embed", cfg.layer_norm_eps, rngs=rngs)
        self.mlp = MLP(cfg, rngs=rngs)


class VisionTail(nnx.Module):
    """Parameters only, without a forward pass."""

    def __init__(self, cfg: VisionConfig, *, rngs: nnx.Rngs) -> None:
        self.layer = EncoderLayer(cfg, rngs=rngs)
        self.post_layernorm = LayerNorm(cfg.hidden_size, "patch_embed", cfg.layer_norm_eps, rngs=rngs)
        self.head = PoolingHead(cfg, rngs=rngs)
