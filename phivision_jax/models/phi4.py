"""The Phi-4 decoder: RMSNorm, grouped-query attention with RoPE, SwiGLU, an untied head.

Source: Phi-4 (arXiv 2412.08905) and transformers' ``modeling_phi3.py``, whose submodule names it keeps. The files'
fused ``qkv_proj`` and ``gate_up_proj`` are separate layers here, so that each has axes a mesh can split.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.nn.initializers import truncated_normal
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from phivision_jax.config import DecoderConfig
from phivision_jax.models.attention.attend import attend
from phivision_jax.models.elementwise import swiglu
from phivision_jax.models.few_rows import are_few, are_single, project_few, project_single
from phivision_jax.models.layers import Linear, RMSNorm, apply_rope, param, residual_scale, rope_angles, stack
from phivision_jax.models.lookup import lookup
from phivision_jax.models.remat import INPUT, QKV, checkpoint
from phivision_jax.sharding import constrain

type AttentionFn = Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]
"""The attention of a layer: (q [B, T, N, H], k [B, T, K, H], v [B, T, K, H], inputs) → (out [B, T, N, H], outputs).
Training attends within the row; generation also reads and returns keys and values (``inference/programs.py``)."""


def attend_in_row(segment_ids: Int32[Array, "B T"], span_end: Int32[Array, "B T"]) -> AttentionFn:
    """Attention among the tokens of a packed row."""

    def attention(q: jax.Array, k: jax.Array, v: jax.Array, _: Any) -> tuple[jax.Array, None]:
        return attend(q, k, v, span_end=span_end, segment_ids=segment_ids), None

    return attention


class Attention(nnx.Module):
    def __init__(self, cfg: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        D, N, K, H = cfg.hidden_size, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        self.q_proj = Linear("BTD,DNH->BTNH", (D, N, H), ("embed", "heads", "head_dim"), rngs=rngs)
        self.k_proj = Linear("BTD,DKH->BTKH", (D, K, H), ("embed", "kv_heads", "head_dim"), rngs=rngs)
        self.v_proj = Linear("BTD,DKH->BTKH", (D, K, H), ("embed", "kv_heads", "head_dim"), rngs=rngs)
        scale = residual_scale(cfg.num_layers)
        self.o_proj = Linear("BTNH,NHD->BTD", (N, H, D), ("heads", "head_dim", "embed"), rngs=rngs, init_scale=scale)

    @jax.named_scope("attention")
    def __call__(
        self,
        x: Float[Array, "B T D"],
        rope: tuple[jax.Array, jax.Array],
        attention: AttentionFn,
        inputs: Any,
    ) -> tuple[Float[Array, "B T D"], Any]:
        q, k, v = apply_rope(self.q_proj(x), *rope), apply_rope(self.k_proj(x), *rope), self.v_proj(x)
        q, k, v = (checkpoint_name(y, QKV) for y in (q, k, v))
        out, outputs = attention(q, k, v, inputs)
        return self.o_proj(out), outputs


class MLP(nnx.Module):
    def __init__(self, cfg: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        D, F = cfg.hidden_size, cfg.intermediate_size
        scale = residual_scale(cfg.num_layers)
        self.gate_proj = Linear("BTD,DF->BTF", (D, F), ("embed", "mlp"), rngs=rngs)
        self.up_proj = Linear("BTD,DF->BTF", (D, F), ("embed", "mlp"), rngs=rngs)
        self.down_proj = Linear("BTF,FD->BTD", (F, D), ("mlp", "embed"), rngs=rngs, init_scale=scale)

    @jax.named_scope("mlp")
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class DecoderLayer(nnx.Module):
    def __init__(self, cfg: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        self.input_layernorm = RMSNorm(cfg.hidden_size, "embed", cfg.rms_norm_eps, rngs=rngs)
        self.self_attn = Attention(cfg, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, "embed", cfg.rms_norm_eps, rngs=rngs)
        self.mlp = MLP(cfg, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], rope: tuple[jax.Array, jax.Array], attention: AttentionFn, inputs: Any
    ) -> tuple[Float[Array, "B T D"], Any]:
        x = checkpoint_name(x, INPUT)
        out, outputs = self.self_attn(self.input_layernorm(x), rope, attention, inputs)
        x = x + out
        x = x + self.mlp(self.post_attention_layernorm(x))
        return constrain(x, "batch", "length", "width"), outputs


class Embed(nnx.Module):
    scale: nnx.Param | None = None

    def __init__(self, cfg: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        init = truncated_normal(0.02)
        self.embedding = param(rngs, (cfg.vocab_size, cfg.hidden_size), ("vocab", "embed"), init)

    @jax.named_scope("embed")
    def __call__(self, tokens: Int32[Array, "B T"]) -> Float[Array, "B T D"]:
        found = lookup(self.embedding[...], tokens)
        return found if self.scale is None else found * self.scale[...][tokens][..., None]


class Head(nnx.Module):
    """fp32 logits. The kernel is [V, D], as the embedding table and the file have it."""

    scale: nnx.Param | None = None

    def __init__(self, cfg: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        init = truncated_normal(cfg.hidden_size**-0.5)
        self.kernel = param(rngs, (cfg.vocab_size, cfg.hidden_size), ("vocab", "embed"), init)

    @jax.named_scope("head")
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        kernel = self.kernel[...]
        if are_single(math.prod(x.shape[:-1]), kernel.dtype, x.dtype):
            logits = project_single(x, kernel, 1, outputs_first=True)
        elif are_few(x):
            logits = project_few(x, kernel.astype(x.dtype), 1)
        else:
            logits = jnp.einsum("BTD,VD->BTV", x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
        return logits if self.scale is None else logits * self.scale[...].astype(jnp.float32)


class Phi4Decoder(nnx.Module):
    """Embeddings to normalised hidden states; callers apply ``embed_tokens`` before and ``lm_head`` after."""

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
    ) -> Float[Array, "B T D"]:
        """Run the layers and the final norm on packed rows."""
        return self.run(embeds, positions, attend_in_row(segment_ids, span_end))[0]

    @jax.named_scope("decoder")
    def run(
        self,
        embeds: Float[Array, "B T D"],
        positions: Int32[Array, "B T"],
        attention: AttentionFn,
        inputs: Any = None,
        layers: Sequence[DecoderLayer] | None = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Run the layers and the final norm, with an attention of the caller's.

        Args:
          inputs: of ``attention``, stacked over layers; a list with one entry per layer if ``layers`` is given.
          layers: run these instead of scanning over the stacked ones. CPUs cannot read a layer of a stack without
            copying it, which takes three times as long as reading it.

        Returns:
          Hidden states after the final norm, and the outputs of ``attention``, stacked or listed as the inputs are.
        """
        rope = rope_angles(positions, self.head_dim, self.rope_theta)

        def body(x: jax.Array, layer_and_inputs: tuple[DecoderLayer, Any]) -> tuple[jax.Array, Any]:
            layer, layer_inputs = layer_and_inputs
            return layer(x, rope, attention, layer_inputs)

        x = constrain(embeds.astype(self.dtype), "batch", "length", "width")
        if layers is None:
            x, outputs = jax.lax.scan(checkpoint(body, self.remat), x, (self.layers, inputs))
        else:
            outputs = []
            for layer_and_inputs in zip(layers, inputs, strict=True):
                x, output = body(x, layer_and_inputs)
                outputs.append(output)
        return self.norm(x), outputs
