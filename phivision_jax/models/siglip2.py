"""The SigLIP-2 NaFlex vision encoder: any grid, many images packed in a row, attention inside each image only.

Source: SigLIP 2 (arXiv 2502.14786, NaFlex) and transformers' ``modeling_siglip2.py``, whose submodule names it keeps.
The features are ``hidden_states[-2]``: the last block, its post-norm and the pooling head never run and live in
checkpoints only, as ``vision_tail``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32, UInt8

from phivision_jax.config import VisionConfig
from phivision_jax.models.attention.attend import attend
from phivision_jax.models.elementwise import gelu
from phivision_jax.models.layers import LayerNorm, Linear, param, stack, truncated_normal
from phivision_jax.models.remat import INPUT, QKV, checkpoint, name
from phivision_jax.sharding import constrain


def interpolation_weights(index: Int32[Array, ...], size: Int32[Array, ...], side: int) -> Float[Array, "... side"]:
    """How much each of ``side`` table entries weighs at output ``index`` of an axis resized to ``size``.

    Bilinear, antialiased, align_corners=False, as ``torch.nn.functional.interpolate(antialias=True)`` defines it: a
    triangle of half-width max(side/size, 1) around the output's centre, normalised over the table.
    """
    scale = side / size.astype(jnp.float32)
    centre = (index.astype(jnp.float32) + 0.5) * scale
    distance = jnp.arange(side) + 0.5 - centre[..., None]
    weights = jnp.maximum(1.0 - jnp.abs(distance) / jnp.maximum(scale, 1.0)[..., None], 0.0)
    return weights / weights.sum(-1, keepdims=True)


class PositionEmbedding(nnx.Module):
    """A 16×16 table resized to each image's grid.

    Bilinear resizing is separable, so a patch's embedding is (row weights ⊗ column weights) · table: one small matrix
    product with static shapes, for any grid from 1×188 to 214×16.
    """

    def __init__(self, cfg: VisionConfig, *, rngs: nnx.Rngs) -> None:
        self.side = cfg.position_side
        init = truncated_normal(cfg.hidden_size**-0.5)
        self.embedding = param(rngs, (cfg.num_positions, cfg.hidden_size), (None, "patch_embed"), init)

    def __call__(self, coords: Int32[Array, "*B P 2"], grid: Int32[Array, "*B P 2"]) -> Float[Array, "*B P C"]:
        rows = interpolation_weights(coords[..., 0], grid[..., 0], self.side)
        columns = interpolation_weights(coords[..., 1], grid[..., 1], self.side)
        weights = (rows[..., :, None] * columns[..., None, :]).reshape(*coords.shape[:-1], -1)  # [B, P, 256]
        return weights @ self.embedding[...]


class Attention(nnx.Module):
    def __init__(self, cfg: VisionConfig, *, rngs: nnx.Rngs) -> None:
        C, N, H = cfg.hidden_size, cfg.num_heads, cfg.head_dim
        qkv_axes = ("patch_embed", "patch_heads", "head_dim")
        self.q_proj = Linear((C,), (N, H), qkv_axes, bias=True, rngs=rngs)
        self.k_proj = Linear((C,), (N, H), qkv_axes, bias=True, rngs=rngs)
        self.v_proj = Linear((C,), (N, H), qkv_axes, bias=True, rngs=rngs)
        self.out_proj = Linear(
            (N, H), (C,), ("patch_heads", "head_dim", "patch_embed"), bias=True, rngs=rngs, init_scale=_residual(cfg)
        )

    def __call__(self, x: Float[Array, "B R P C"], segments: Int32[Array, "B R P"]) -> Float[Array, "B R P C"]:
        q, k, v = (name(proj(x), QKV) for proj in (self.q_proj, self.k_proj, self.v_proj))  # [B, R, P, N, H]
        out = attend(q, k, v, segment_ids=segments, axes=("batch", "vision_rows", None, "patch_heads"))
        return self.out_proj(out)


class MLP(nnx.Module):
    def __init__(self, cfg: VisionConfig, *, rngs: nnx.Rngs) -> None:
        C, F = cfg.hidden_size, cfg.intermediate_size
        self.fc1 = Linear((C,), (F,), ("patch_embed", "patch_mlp"), bias=True, rngs=rngs)
        self.fc2 = Linear((F,), (C,), ("patch_mlp", "patch_embed"), bias=True, rngs=rngs, init_scale=_residual(cfg))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(gelu(self.fc1(x)))


class EncoderLayer(nnx.Module):
    def __init__(self, cfg: VisionConfig, *, rngs: nnx.Rngs) -> None:
        self.layer_norm1 = LayerNorm(cfg.hidden_size, "patch_embed", cfg.layer_norm_eps, rngs=rngs)
        self.self_attn = Attention(cfg, rngs=rngs)
        self.layer_norm2 = LayerNorm(cfg.hidden_size, "patch_embed", cfg.layer_norm_eps, rngs=rngs)
        self.mlp = MLP(cfg, rngs=rngs)

    def __call__(self, x: Float[Array, "B R P C"], segments: Int32[Array, "B R P"]) -> Float[Array, "B R P C"]:
        x = name(x, INPUT)
        x = x + self.self_attn(self.layer_norm1(x), segments)
        x = x + self.mlp(self.layer_norm2(x))
        return constrain(x, "batch", "vision_rows", None, None)


class Siglip2Encoder(nnx.Module):
    """Patches to features; see the module's docstring."""

    def __init__(self, cfg: VisionConfig, *, rngs: nnx.Rngs, dtype: DTypeLike, remat: str) -> None:
        self.dtype, self.remat = jnp.dtype(dtype), remat
        self.patch_embedding = Linear((cfg.patch_dim,), (cfg.hidden_size,), (None, "patch_embed"), bias=True, rngs=rngs)
        self.position_embedding = PositionEmbedding(cfg, rngs=rngs)
        self.layers = stack(lambda r: EncoderLayer(cfg, rngs=r), cfg.num_active_layers, rngs)

    def __call__(
        self,
        patches: UInt8[Array, "B R P patch_dim"],
        segments: Int32[Array, "B R P"],
        coords: Int32[Array, "B R P 2"],
        grid: Int32[Array, "B R P 2"],
    ) -> Float[Array, "B R P C"]:
        """Encode packed images; attention never leaves a vision row, nor an image within it.

        Features of padding (segment 0) are finite and meaningless.
        """
        pixels = patches.astype(jnp.float32) / 127.5 - 1.0  # (x/255 - 0.5) / 0.5, the released normalisation
        x = self.patch_embedding(pixels.astype(self.dtype))
        x = x + self.position_embedding(coords, grid).astype(self.dtype)
        x = constrain(x, "batch", "vision_rows", None, None)
        body = checkpoint(lambda x, layer: (layer(x, segments), None), self.remat)
        return jax.lax.scan(body, x, self.layers)[0]


def _residual(cfg: VisionConfig) -> float:
    """Scale of the layers that write into the residual stream: their sum over the depth keeps unit variance."""
    return (2 * cfg.num_layers) ** -0.5
