"""The Phi-4 decoder: RMSNorm, grouped-query attention with RoPE, SwiGLU, an untied head.

Source: Phi-4 (arXiv 2412.08905) and transformers' ``modeling_phi3.py``, whose submodule names it keeps. The fused
``qkv_proj`` and ``gate_up_proj`` of the files stand apart here, so that each has axes a mesh can split.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from phivision_jax.config import DecoderConfig
from phivision_jax.models.attention.attend import attend
from phivision_jax.models.elementwise import swiglu
from phivision_jax.models.layers import Linear, RMSNorm, apply_rope, param, rope_angles, stack, truncated_normal
from phivision_jax.models.lookup import lookup
from phivision_jax.models.remat import INPUT, QKV, checkpoint, name
from phivision_jax.sharding import constrain

LayerCache = tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]
"""Keys and values of one layer; stacked over layers they gain a leading L."""


class Attention(nnx.Module):
    def __init__(self, cfg: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        D, N, K, H = cfg.hidden_size, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        self.q_proj = Linear((D,), (N, H), ("embed", "heads", "head_dim"), rngs=rngs)
        self.k_proj = Linear((D,), (K, H), ("embed", "kv_heads", "head_dim"), rngs=rngs)
        self.v_proj = Linear((D,), (K, H), ("embed", "kv_heads", "head_dim"), rngs=rngs)
        self.o_proj = Linear((N, H), (D,), ("heads", "head_dim", "embed"), rngs=rngs, init_scale=_residual(cfg))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rope: tuple[jax.Array, jax.Array],
        span_end: Int32[Array, "B T"],
        segment_ids: Int32[Array, "B T"],
        cache: LayerCache | None,
        cache_segments: Int32[Array, "B S"] | None,
        column: jax.Array | int,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)  # [B, T, N or K, H]
        q, k, v = name(apply_rope(q, *rope), QKV), name(apply_rope(k, *rope), QKV), name(v, QKV)
        if cache is not None:
            k = jax.lax.dynamic_update_slice_in_dim(cache[0], k.astype(cache[0].dtype), column, axis=1)
            v = jax.lax.dynamic_update_slice_in_dim(cache[1], v.astype(cache[1].dtype), column, axis=1)
            cache = (k, v)
        out = attend(q, k, v, span_end=span_end, segment_ids=segment_ids, kv_segment_ids=cache_segments)
        return self.o_proj(out), cache


class MLP(nnx.Module):
    def __init__(self, cfg: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        D, F = cfg.hidden_size, cfg.intermediate_size
        self.gate_proj = Linear((D,), (F,), ("embed", "mlp"), rngs=rngs)
        self.up_proj = Linear((D,), (F,), ("embed", "mlp"), rngs=rngs)
        self.down_proj = Linear((F,), (D,), ("mlp", "embed"), rngs=rngs, init_scale=_residual(cfg))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class DecoderLayer(nnx.Module):
    def __init__(self, cfg: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        self.input_layernorm = RMSNorm(cfg.hidden_size, "embed", cfg.rms_norm_eps, rngs=rngs)
        self.self_attn = Attention(cfg, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, "embed", cfg.rms_norm_eps, rngs=rngs)
        self.mlp = MLP(cfg, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], *attention_args) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        x = name(x, INPUT)
        out, cache = self.self_attn(self.input_layernorm(x), *attention_args)
        x = x + out
        x = x + self.mlp(self.post_attention_layernorm(x))
        return constrain(x, "batch", "length", None), cache


class Embed(nnx.Module):
    def __init__(self, cfg: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        init = truncated_normal(0.02)
        self.embedding = param(rngs, (cfg.vocab_size, cfg.hidden_size), ("vocab", "embed"), init)

    def __call__(self, tokens: Int32[Array, "B T"]) -> Float[Array, "B T D"]:
        return lookup(self.embedding[...], tokens)


class Head(nnx.Module):
    """Logits in fp32. The kernel is [V, D], the orientation of the embedding table and of the file."""

    def __init__(self, cfg: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        init = truncated_normal(cfg.hidden_size**-0.5)
        self.kernel = param(rngs, (cfg.vocab_size, cfg.hidden_size), ("vocab", "embed"), init)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        kernel = self.kernel[...].astype(x.dtype)
        return jnp.einsum("BTD,VD->BTV", x, kernel, preferred_element_type=jnp.float32)


class Phi4Decoder(nnx.Module):
    """Embeddings to normalised hidden states; ``embed_tokens`` and ``lm_head`` are called around it."""

    def __init__(self, cfg: DecoderConfig, *, rngs: nnx.Rngs, dtype: DTypeLike, remat: str) -> None:
        self.head_dim, self.rope_theta, self.dtype, self.remat = cfg.head_dim, cfg.rope_theta, jnp.dtype(dtype), remat
        self.embed_tokens = Embed(cfg, rngs=rngs)
        self.layers = stack(lambda r: DecoderLayer(cfg, rngs=r), cfg.num_layers, rngs)
        self.norm = RMSNorm(cfg.hidden_size, "embed", cfg.rms_norm_eps, rngs=rngs)
        self.lm_head = Head(cfg, rngs=rngs)

    def __call__(
        self,
        embeds: Float[Array, "B T D"],
        positions: Int32[Array, "B T"],
        span_end: Int32[Array, "B T"],
        segment_ids: Int32[Array, "B T"],
        *,
        cache: LayerCache | None = None,
        cache_segments: Int32[Array, "B S"] | None = None,
        column: jax.Array | int = 0,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """Run the layers and the final norm.

        Args:
          cache: keys and values of all layers, [L, B, S, K, H] each; the T new columns are written at ``column``.
          cache_segments: segment of every cache column *after* this call, 0 where nothing was written.

        Returns:
          Hidden states after the final norm, and the cache with the new columns (None without one).
        """
        rope = rope_angles(positions, self.head_dim, self.rope_theta)

        def body(x, layer_and_cache):
            layer, layer_cache = layer_and_cache
            return layer(x, rope, span_end, segment_ids, layer_cache, cache_segments, column)

        x = constrain(embeds.astype(self.dtype), "batch", "length", None)
        x, cache = jax.lax.scan(checkpoint(body, self.remat), x, (self.layers, cache))
        return self.norm(x), cache


def _residual(cfg: DecoderConfig) -> float:
    """Scale of the layers that write into the residual stream: their sum over the depth keeps unit variance."""
    return (2 * cfg.num_layers) ** -0.5
