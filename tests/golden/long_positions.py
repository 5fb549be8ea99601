"""A random decoder with the released width of a head and base of RoPE, small otherwise, for rows of 4,096 tokens.

Queries and keys are large, so that attention depends on the exact angles. NumPy alone makes it, in the test again.
"""

from __future__ import annotations

import math

import numpy as np

SEED = 11
LENGTH = 4096
WIDTH, MLP, VOCAB, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 256, 192, 256, 4, 2, 1, 128
THETA, EPS = 500_000.0, 1e-5
SHARPNESS = 1.5
"""Standard deviation of the outputs of q_proj and k_proj, for normalized inputs."""
SHOWN = slice(63, None, 64)
"""The positions whose logits are stored."""


def weights() -> dict[str, np.ndarray]:
    """Weights by their Hugging Face names, [out, in] f32; q, k, v and gate, up are separate."""
    rng = np.random.default_rng(SEED)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, WIDTH)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}{norm}.weight": (WIDTH,) for norm in ("input_layernorm", "post_attention_layernorm")}
        heads = {"q": HEADS, "k": KV_HEADS, "v": KV_HEADS}
        shapes |= {f"{layer}self_attn.{x}_proj.weight": (n * HEAD_DIM, WIDTH) for x, n in heads.items()}
        shapes[f"{layer}self_attn.o_proj.weight"] = (WIDTH, HEADS * HEAD_DIM)
        shapes |= {f"{layer}mlp.{x}_proj.weight": (MLP, WIDTH) for x in ("gate", "up")}
        shapes[f"{layer}mlp.down_proj.weight"] = (WIDTH, MLP)
    shapes |= {"model.norm.weight": (WIDTH,), "lm_head.weight": (VOCAB, WIDTH)}
    found = {}
    for name, shape in shapes.items():
        scale = SHARPNESS if "q_proj" in name or "k_proj" in name else 1.0
        noise = rng.standard_normal(shape) * (scale / math.sqrt(shape[-1]) if len(shape) > 1 else 0.25)
        found[name] = (noise + (len(shape) == 1)).astype(np.float32)
    return found


def inputs() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Ids and positions of two rows: of consecutive positions, and of every eighth up to 32,767."""
    rng = np.random.default_rng([SEED, 1])
    near = np.arange(LENGTH, dtype=np.int32)
    rows = {"near": near, "far": 8 * near + 7}
    return {name: (rng.integers(0, VOCAB, LENGTH).astype(np.int32), positions) for name, positions in rows.items()}
