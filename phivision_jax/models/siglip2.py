"""The SigLIP-2 vision encoder: any grid, many tiles packed in a row, attention inside each tile only.

NaFlex and fixed-resolution models are the same network. A fixed-resolution model, whose patch embedding transformers
writes as a convolution, gets grids of its table's size only, for which resizing the table is the identity.

Source: SigLIP 2 (arXiv 2502.14786, NaFlex) and transformers' ``modeling_siglip2.py``, whose submodule names it keeps.
The features are ``hidden_states[-2]``: the last block, its post-norm and the pooling head never run (``VisionTail``).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.nn.initializers import truncated_normal
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from phivision_jax.batch import Batch
from phivision_jax.config import VisionConfig
from phivision_jax.models.attention.attend import attend
from phivision_jax.models.elementwise import gelu
from phivision_jax.models.layers import LayerNorm, Linear, param, residual_scale, stack
from phivision_jax.models.remat import INPUT, QKV, checkpoint
from phivision_jax.sharding import constrain


def interpolation_weights(index: Int32[Array, ...], size: Int32[Array, ...], side: int) -> Float[Array, "... side"]:
    """The weights of ``side`` table entries at output ``index`` of an axis resized to ``size``.

    Bilinear, antialiased, align_corners=False, as ``torch.nn.functional.interpolate(antialias=True)`` defines it: a
    triangle of half-width max(side/size, 1) around the output's centre, normalised over the table. For grids one patch
    wide and more than ``side`` high, PyTorch 2.13 on CPUs departs from this definition, and so does the released code.
    """
    scale = side / size.astype(jnp.float32)
    centre = (index.astype(jnp.float32) + 0.5) * scale
    distance = jnp.arange(side) + 0.5 - centre[..., None]
    weights = jnp.maximum(1.0 - jnp.abs(distance) / jnp.maximum(scale, 1.0)[..., None], 0.0)
    return weights / weights.sum(-1, keepdims=True)


class PositionEmbedding(nnx.Module):
    """A square table resized to each tile's grid, 16×16 in NaFlex; ``axis`` is the logical name of its channels.

    Bilinear resizing is separable, so a patch's embedding is (row weights ⊗ column weights) · table: one small matrix
    product with static shapes, for any grid from 1×188 to 214×16.
    """

    def __init__(self, cfg: VisionConfig, *, rngs: nnx.Rngs, axis: str = "patch_embed") -> None:
        self.side = cfg.position_side
        init = truncated_normal(cfg.hidden_size**-0.5)
        self.embedding = param(rngs, (cfg.num_positions, cfg.hidden_size), (None, axis), init)

    def __call__(self, coords: Int32[Array, "*B P 2"], grid: Int32[Array, "*B P 2"]) -> Float[Array, "*B P C"]:
        rows = interpolation_weights(coords[..., 0], grid[..., 0], self.side)
        columns = interpolation_weights(coords[..., 1], grid[..., 1], self.side)
        weights = rearrange(rows[..., :, None] * columns[..., None, :], "... row column -> ... (row column)")
        return weights @ self.embedding[...]  # [B, P, S] · [S, C]


class Attention(nnx.Module):
    def __init__(self, cfg: VisionConfig, *, rngs: nnx.Rngs) -> None:
        C, N, H = cfg.hidden_size, cfg.num_heads, cfg.head_dim
        inputs, outputs = ("patch_embed", "patch_heads", "head_dim"), ("patch_heads", "head_dim", "patch_embed")
        scale = residual_scale(cfg.num_layers)
        self.q_proj = Linear("BRPC,CNH->BRPNH", (C, N, H), inputs, bias=True, rngs=rngs)
        self.k_proj = Linear("BRPC,CNH->BRPNH", (C, N, H), inputs, bias=True, rngs=rngs)
        self.v_proj = Linear("BRPC,CNH->BRPNH", (C, N, H), inputs, bias=True, rngs=rngs)
        self.out_proj = Linear("BRPNH,NHC->BRPC", (N, H, C), outputs, bias=True, rngs=rngs, init_scale=scale)

    @jax.named_scope("attention")
    def __call__(self, x: Float[Array, "B R P C"], segments: Int32[Array, "B R P"]) -> Float[Array, "B R P C"]:
        q, k, v = (checkpoint_name(proj(x), QKV) for proj in (self.q_proj, self.k_proj, self.v_proj))
        out = attend(q, k, v, segment_ids=segments, axes=("batch", "vision_rows", None, "patch_heads"))
        return self.out_proj(out)


class MLP(nnx.Module):
    def __init__(self, cfg: VisionConfig, *, rngs: nnx.Rngs) -> None:
        C, F = cfg.hidden_size, cfg.intermediate_size
        scale = residual_scale(cfg.num_layers)
        self.fc1 = Linear("BRPC,CF->BRPF", (C, F), ("patch_embed", "patch_mlp"), bias=True, rngs=rngs)
        self.fc2 = Linear("BRPF,FC->BRPC", (F, C), ("patch_mlp", "patch_embed"), bias=True, rngs=rngs, init_scale=scale)

    @jax.named_scope("mlp")
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(gelu(self.fc1(x)))


class EncoderLayer(nnx.Module):
    def __init__(self, cfg: VisionConfig, *, rngs: nnx.Rngs) -> None:
        self.layer_norm1 = LayerNorm(cfg.hidden_size, "patch_embed", cfg.layer_norm_eps, rngs=rngs)
        self.self_attn = Attention(cfg, rngs=rngs)
        self.layer_norm2 = LayerNorm(cfg.hidden_size, "patch_embed", cfg.layer_norm_eps, rngs=rngs)
        self.mlp = MLP(cfg, rngs=rngs)

    def __call__(self, x: Float[Array, "B R P C"], segments: Int32[Array, "B R P"]) -> Float[Array, "B R P C"]:
        x = checkpoint_name(x, INPUT)
        x = x + self.self_attn(self.layer_norm1(x), segments)
        x = x + self.mlp(self.layer_norm2(x))
        return constrain(x, "batch", "vision_rows", None, None)


def pixel_values(batch: Batch, dtype: DTypeLike) -> Float[Array, "B R P F"]:
    """Patches normalised as released, (x/255 − 0.5) / 0.5, and cast to ``dtype``."""
    return (batch.patches.astype(jnp.float32) / 127.5 - 1.0).astype(dtype)


class Siglip2Encoder(nnx.Module):
    """The encoder as a ``models.phivision.VisionSide``: attention never leaves a vision row, nor an image within it."""

    def __init__(self, cfg: VisionConfig, *, rngs: nnx.Rngs, dtype: DTypeLike, remat: str) -> None:
        self.width, self.dtype, self.remat = cfg.hidden_size, jnp.dtype(dtype), remat
        C, axes = cfg.hidden_size, (None, "patch_embed")
        self.patch_embedding = Linear("BRPF,FC->BRPC", (cfg.patch_dim, C), axes, bias=True, rngs=rngs)
        self.position_embedding = PositionEmbedding(cfg, rngs=rngs)
        self.layers = stack(lambda r: EncoderLayer(cfg, rngs=r), cfg.num_active_layers, rngs)

    def __call__(self, batch: Batch) -> Float[Array, "B R P C"]:
        x = self.patch_embedding(pixel_values(batch, self.dtype))
        x = x + self.position_embedding(batch.patch_coords, batch.patch_grid).astype(self.dtype)
        x = constrain(x, "batch", "vision_rows", None, None)
        body = checkpoint(lambda x, layer: (layer(x, batch.patch_segments), None), self.remat)
        return jax.lax.scan(body, x, self.layers)[0]


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
    """The last block, its post-norm and the pooling head: parameters that checkpoints carry but that never run.

    They exist so that a model trained from random weights can be written in the released layout.
    """

    def __init__(self, cfg: VisionConfig, *, rngs: nnx.Rngs) -> None:
        self.layer = EncoderLayer(cfg, rngs=rngs)
        self.post_layernorm = LayerNorm(cfg.hidden_size, "patch_embed", cfg.layer_norm_eps, rngs=rngs)
        self.head = PoolingHead(cfg, rngs=rngs)
