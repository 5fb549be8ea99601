"""The tiny checkpoint of this folder: the released layout at another size, with weights that reveal every mistake.

Norm scales are not 1 and biases not 0. The position table is as large as the patch embeddings; both, and the token
embeddings, are small enough for a wrong epsilon to change the result. Attention is sharp enough for a wrong mask. Sizes
are chosen to catch transposes: 3 vision heads of 14, 6 decoder heads of 8 in groups of 3. The configuration has the
released file's keys.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from reference import Reference
from safetensors.numpy import save_file

SEED = 10
SHARDS = 3

CONFIG: dict[str, Any] = {
    "architectures": ["Phi4ForCausalLMV"],
    "auto_map": {
        "AutoConfig": "modeling_phi4_visionr.Phi4VisionR",
        "AutoModelForCausalLM": "modeling_phi4_visionr.Phi4ForCausalLMV",
        "AutoProcessor": "processing_phi4_visionr.Phi4VisionRProcessor",
    },
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 251,
    "dtype": "float32",
    "embd_pdrop": 0.0,
    "eos_token_id": 252,
    "freeze_mm_mlp_adapter": False,
    "hidden_act": "silu",
    "hidden_size": 48,
    "image_aspect_ratio": "square",
    "initializer_range": 0.02,
    "intermediate_size": 80,
    "max_num_patches": 48,
    "max_position_embeddings": 1024,
    "min_num_patches": 4,
    "mm_hidden_size": 42,
    "mm_projector_lr": 2e-05,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_tower": "google/siglip2-so400m-patch16-naflex",
    "model_type": "phi4-siglip",
    "num_attention_heads": 6,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "original_max_position_embeddings": 1024,
    "pad_token_id": 253,
    "partial_rotary_factor": 1.0,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "tokenizer_model_max_length": 256,
    "tokenizer_padding_side": "right",
    "transformers_version": "4.56.1",
    "tune_mm_mlp_adapter": False,
    "unfreeze_vision_tower": True,
    "use_cache": False,
    "use_mm_proj": True,
    "use_s2": False,
    "vocab_size": 256,
    "vision_config": {
        "hidden_size": 42,
        "intermediate_size": 70,
        "model_type": "siglip2_vision_model",
        "num_attention_heads": 3,
        "num_hidden_layers": 3,
    },
}
GENERATION_CONFIG = {
    "_from_model_config": True,
    "bos_token_id": CONFIG["bos_token_id"],
    "do_sample": True,
    "eos_token_id": [CONFIG["eos_token_id"]],
    "pad_token_id": CONFIG["pad_token_id"],
    "temperature": 0.8,
    "top_p": 0.95,
    "transformers_version": "4.56.1",
}
PREPROCESSOR_CONFIG = {
    "auto_map": {"AutoProcessor": "processing_phi4_visionr.Phi4VisionRProcessor"},
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "Siglip2ImageProcessorNoUpscale",
    "image_std": [0.5, 0.5, 0.5],
    "max_num_patches": CONFIG["max_num_patches"],
    "min_num_patches": CONFIG["min_num_patches"],
    "patch_size": 16,
    "processor_class": "Phi4VisionRProcessor",
    "rescale_factor": 1 / 255,
    "resample": 2,
}


def draw(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """One random weight, float32."""
    noise = rng.standard_normal(shape)
    # The input of a tower is small, as in the released weights, so that a norm's epsilon matters.
    if name.endswith(("position_embedding.weight", "embed_tokens.weight")):
        scale, centre = 0.02, 0.0
    elif "patch_embedding" in name:
        scale, centre = (0.03 / math.sqrt(shape[-1]) if len(shape) > 1 else 0.005), 0.0
    elif len(shape) == 1:
        scale, centre = 0.25, (1.0 if name.endswith("weight") else 0.0)
    else:
        sharp = any(part in name for part in ("q_proj", "k_proj", "qkv_proj", "lm_head"))
        scale, centre = (1.5 if sharp else 1.0) / math.sqrt(shape[-1]), 0.0
    return (centre + scale * noise).astype(np.float32)


def weights() -> dict[str, np.ndarray]:
    """Its tensors by name, in the order in which the released shards hold them."""
    rng = np.random.default_rng(SEED)
    return {name: draw(name, tuple(p.shape), rng) for name, p in Reference(CONFIG).parameters()}


def shards(tensors: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Split into files of about equal size anywhere: a layer spans two of them, as in the released checkpoint."""
    out: dict[str, dict[str, np.ndarray]] = {}
    total, done = sum(t.nbytes for t in tensors.values()), 0
    for name, tensor in tensors.items():
        file = f"model-{done * SHARDS // total + 1:05d}-of-{SHARDS:05d}.safetensors"
        out.setdefault(file, {})[name] = tensor
        done += tensor.nbytes
    return out


def write_checkpoint(directory: Path) -> None:
    tensors = weights()
    files = shards(tensors)
    for file, part in files.items():
        save_file(part, directory / file, metadata={"format": "pt"})
    index = {
        "metadata": {
            "total_parameters": sum(t.size for t in tensors.values()),
            "total_size": sum(t.nbytes for t in tensors.values()),
        },
        "weight_map": dict(sorted((n, f) for f, part in files.items() for n in part)),
    }
    for file, content in (
        ("model.safetensors.index.json", index),
        ("config.json", CONFIG),
        ("generation_config.json", GENERATION_CONFIG),
        ("preprocessor_config.json", PREPROCESSOR_CONFIG),
    ):
        (directory / file).write_text(json.dumps(content, indent=2) + "\n")
