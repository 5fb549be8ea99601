"""Small random checkpoints in the released layout, with names and shapes written by hand.

Nothing here comes from ``convert``: a test that takes its names from the table under test can only agree with it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

VISION = "model.vision_tower.vision_tower.vision_model"


def text_shapes(d: int, f: int, layers: int, heads: int, kv: int, vocab: int) -> dict[str, tuple[int, ...]]:
    h = d // heads
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, d)}
    for i in range(layers):
        layer = f"model.layers.{i}"
        shapes[f"{layer}.self_attn.qkv_proj.weight"] = ((heads + 2 * kv) * h, d)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (d, heads * h)
        shapes[f"{layer}.mlp.gate_up_proj.weight"] = (2 * f, d)
        shapes[f"{layer}.mlp.down_proj.weight"] = (d, f)
        shapes[f"{layer}.input_layernorm.weight"] = (d,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (d,)
    return shapes | {"model.norm.weight": (d,), "lm_head.weight": (vocab, d)}


def vision_shapes(
    c: int, f: int, layers: int, patch: int, positions: int, prefix: str = VISION
) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.patch_embedding.weight": (c, patch * patch * 3),
        "embeddings.patch_embedding.bias": (c,),
        "embeddings.position_embedding.weight": (positions, c),
    }
    for i in range(layers):
        layer = f"encoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes[f"{layer}.self_attn.{name}.weight"] = (c, c)
            shapes[f"{layer}.self_attn.{name}.bias"] = (c,)
        for name in ("layer_norm1", "layer_norm2"):
            shapes[f"{layer}.{name}.weight"] = shapes[f"{layer}.{name}.bias"] = (c,)
        shapes |= _mlp(f"{layer}.mlp", c, f)
    shapes |= {"post_layernorm.weight": (c,), "post_layernorm.bias": (c,), "head.probe": (1, 1, c)}
    shapes |= {"head.attention.in_proj_weight": (3 * c, c), "head.attention.in_proj_bias": (3 * c,)}
    shapes |= {"head.attention.out_proj.weight": (c, c), "head.attention.out_proj.bias": (c,)}
    shapes |= {"head.layernorm.weight": (c,), "head.layernorm.bias": (c,), **_mlp("head.mlp", c, f)}
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def _mlp(name: str, c: int, f: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{name}.fc1.weight": (f, c),
        f"{name}.fc1.bias": (f,),
        f"{name}.fc2.weight": (c, f),
        f"{name}.fc2.bias": (c,),
    }


def projector_shapes(c: int, d: int) -> dict[str, tuple[int, ...]]:
    first = {"model.mm_projector.0.weight": (d, c), "model.mm_projector.0.bias": (d,)}
    return first | {"model.mm_projector.2.weight": (d, d), "model.mm_projector.2.bias": (d,)}


SMALL: dict[str, Any] = {
    "model_type": "phi4-siglip",
    "auto_map": {"AutoConfig": "modeling_phi4_visionr.Phi4VisionR"},
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_theta": 500000,
    "rms_norm_eps": 1e-05,
    "max_position_embeddings": 128,
    "bos_token_id": 45,
    "eos_token_id": 46,
    "pad_token_id": 47,
    "mm_hidden_size": 12,
    "min_num_patches": 4,
    "max_num_patches": 16,
    "dtype": "float32",
    "vision_config": {
        "model_type": "siglip2_vision_model",
        "hidden_size": 12,
        "intermediate_size": 20,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "patch_size": 2,
        "num_patches": 4,
    },
}


def shapes_of(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    v = config["vision_config"]
    text = text_shapes(
        config["hidden_size"],
        config["intermediate_size"],
        config["num_hidden_layers"],
        config["num_attention_heads"],
        config["num_key_value_heads"],
        config["vocab_size"],
    )
    vision = vision_shapes(
        v["hidden_size"], v["intermediate_size"], v["num_hidden_layers"], v["patch_size"], v["num_patches"]
    )
    return text | vision | projector_shapes(v["hidden_size"], config["hidden_size"])


@st.composite
def any_config(draw: Any) -> dict[str, Any]:
    """The ``config.json`` of a small model of any shape."""
    kv, group, half = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    vision_heads, vision_head_dim = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    width = vision_heads * vision_head_dim
    vision = SMALL["vision_config"] | {
        "hidden_size": width,
        "intermediate_size": draw(st.integers(1, 9)),
        "num_hidden_layers": draw(st.integers(2, 4)),
        "num_attention_heads": vision_heads,
        "patch_size": draw(st.integers(1, 3)),
        "num_patches": draw(st.sampled_from([1, 4, 9])),
    }
    return SMALL | {
        "vocab_size": draw(st.integers(48, 70)),
        "hidden_size": kv * group * 2 * half,
        "intermediate_size": draw(st.integers(1, 9)),
        "num_hidden_layers": draw(st.integers(1, 4)),
        "num_attention_heads": kv * group,
        "num_key_value_heads": kv,
        "mm_hidden_size": width,
        "vision_config": vision,
    }


def random_tensors(shapes: dict[str, tuple[int, ...]], dtype: Any, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape, np.float32).astype(dtype) for name, shape in shapes.items()}


def write_hf(
    directory: Path, config: dict[str, Any], tensors: dict[str, np.ndarray], shards: int = 3, seed: int = 0
) -> Path:
    """Write a Hugging Face directory; tensors are distributed over shards at random, so that any order must work."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    (directory / "modeling_phi4_visionr.py").write_text("raise SystemExit('remote code was executed')\n")
    (directory / "tokenizer.json").write_bytes(b'{"not": "parsed"}\r\n')
    (directory / "figures").mkdir()
    (directory / "figures" / "a.bin").write_bytes(bytes(range(256)))
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    names = np.random.default_rng(seed).permutation(sorted(tensors))
    weight_map: dict[str, str] = {}
    for i, group in enumerate(np.array_split(names, shards), start=1):
        file = f"model-{i:05}-of-{shards:05}.safetensors"
        save_file({str(n): tensors[n] for n in group}, directory / file, metadata={"note": "ü"})
        weight_map |= {str(n): file for n in group}
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=3))
    return directory


def write_small(directory: Path, dtype: Any = np.float32, shards: int = 3) -> Path:
    return write_hf(directory, SMALL, random_tensors(shapes_of(SMALL), dtype), shards)


def read_tensors(directory: Path) -> dict[str, np.ndarray]:
    return {name: array for file in directory.glob("*.safetensors") for name, array in load_file(file).items()}


def same_directories(a: Path, b: Path) -> bool:
    """True if two directories hold the same files with the same bytes."""

    def content(directory: Path) -> dict[str, bytes]:
        return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}

    return content(a) == content(b)
