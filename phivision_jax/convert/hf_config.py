"""``ModelConfig`` from a Hugging Face ``config.json``, and back.

Each table pairs a Hugging Face key with our field. Keys that a released file omits take the defaults of its model
classes, and keys that would change the arithmetic are refused unless they have the one value that is computed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phivision_jax.config import DecoderConfig, ModelConfig, ProjectorConfig, VisionConfig
from phivision_jax.io.read_json import read_json
from phivision_jax.io.storage import Location, location


def _same(*keys: str) -> dict[str, str]:
    return {key: key for key in keys}


_BOTH = {"num_hidden_layers": "num_layers", "num_attention_heads": "num_heads"}
_BOTH |= _same("hidden_size", "intermediate_size")
_DECODER_KEYS = _BOTH | {"num_key_value_heads": "num_kv_heads", "max_position_embeddings": "max_positions"}
_DECODER_KEYS |= _same("vocab_size", "rope_theta", "rms_norm_eps", "bos_token_id", "eos_token_id", "pad_token_id")
_VISION_KEYS = {**_BOTH, **_same("patch_size", "layer_norm_eps"), "num_patches": "num_positions"}
_MODEL_KEYS = {"min_num_patches": "min_patches", "max_num_patches": "max_patches"}
# SigLIP-2's class defaults are those of the base model. The other sizes have one default, which is ours too.
_VISION_DEFAULTS = {"hidden_size": 768, "intermediate_size": 3072, "num_layers": 12, "num_heads": 12}
_FIXED_DECODER: dict[str, Any] = {"hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": False}
_FIXED_DECODER |= {"partial_rotary_factor": 1.0, "rope_scaling": None, "sliding_window": None}
_FIXED_DECODER |= dict.fromkeys(("attention_dropout", "embd_pdrop", "resid_pdrop"), 0.0)
_FIXED_MULTIMODAL = {"mm_projector_type": "mlp2x_gelu", "use_s2": False, "use_mm_proj": True}
_FIXED_VISION = {"hidden_act": "gelu_pytorch_tanh", "num_channels": 3, "attention_dropout": 0.0}
_TEMPLATE = Path(__file__).with_name("config_template.json")
"""The other keys that the released model's remote code needs, for a ``config.json`` without a base."""
EXPRESSIBLE: dict[str, Any] = {"image_attention": "causal", "image_layout": "naflex", "projector": ProjectorConfig()}
"""Fields of ``ModelConfig`` that ``config.json`` lacks, and the values that Hugging Face code computes."""


def model_config(source: Mapping[str, Any] | str | Location) -> ModelConfig:
    """Read the configuration of a released-layout model.

    Args:
      source: the contents of a ``config.json``, its path, or the directory that holds it (all may be ``gs://…``).

    Raises:
      ValueError: when the file asks for something that this model does not compute, naming the key.
    """
    if isinstance(source, Mapping):
        values = source
    else:
        path = location(source)
        values = read_json(path / "config.json" if path.is_dir() else path)
    if "vision_config" not in values:
        kind = values.get("model_type", "unknown")
        raise ValueError(f"config.json (model_type {kind!r}) has no vision_config: not a Phi-4-reasoning-vision model")
    _require(values, _FIXED_MULTIMODAL)
    vision, decoder = vision_config(values), decoder_config(values)
    if (width := values.get("mm_hidden_size", vision.hidden_size)) != vision.hidden_size:
        raise ValueError(f"config.json: mm_hidden_size is {width}, vision_config.hidden_size {vision.hidden_size}")
    return ModelConfig(vision=vision, decoder=decoder, **_translate(values, _MODEL_KEYS))


def decoder_config(values: Mapping[str, Any]) -> DecoderConfig:
    """The decoder of a released ``config.json``, or of a text-only Phi-4's.

    Raises:
      ValueError: naming the key that is missing or asks for other arithmetic.
    """
    _require(values, _FIXED_DECODER)
    known = _translate(values, _DECODER_KEYS)
    # transformers 5 writes the RoPE settings as one dict.
    rope = values.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"config.json: rope_parameters is {rope!r}; this model computes plain full-width RoPE only")
    if missing := {"hidden_size", "num_layers", "num_heads"} - known.keys():
        raise ValueError(f"config.json has no decoder {min(missing)}: not a Phi-4 configuration")
    known.setdefault("num_kv_heads", known["num_heads"])
    known["rope_theta"] = float(rope.get("rope_theta", known.get("rope_theta", 10_000.0)))
    if isinstance(known.get("eos_token_id"), list):
        known["eos_token_id"] = known["eos_token_id"][0]
    return DecoderConfig(**known)


def vision_config(values: Mapping[str, Any]) -> VisionConfig:
    """The encoder of a released ``config.json`` or of a SigLIP-2 checkpoint's; it may be the file or its part.

    Raises:
      ValueError: naming the key that asks for other arithmetic.
    """
    values = values.get("vision_config", values)
    _require(values, _FIXED_VISION, "vision_config.")
    return VisionConfig(**{**_VISION_DEFAULTS, **_translate(values, _VISION_KEYS)})


def config_json(model: ModelConfig, base: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The contents of this model's ``config.json``.

    Args:
      base: a ``config.json`` to update; its other keys, and the spelling of equal values, are kept.

    Raises:
      ValueError: when ``config.json`` cannot express this model, see ``EXPRESSIBLE``.
    """
    for field, only in EXPRESSIBLE.items():
        if (value := getattr(model, field)) != only:
            raise ValueError(f"config.json cannot express {field}={value!r}: Hugging Face code computes {only!r}")
    out: dict[str, Any] = read_json(_TEMPLATE) if base is None else dict(base)
    rope = out.get("rope_parameters")
    for theirs, ours in _DECODER_KEYS.items():
        value = getattr(model.decoder, ours)
        if theirs == "rope_theta" and isinstance(rope, Mapping):
            out["rope_parameters"] = {**rope, "rope_theta": value}
        else:
            out[theirs] = _keep_if_equal(out.get(theirs), value)
    vision = dict(out.get("vision_config") or {})
    for theirs, ours in _VISION_KEYS.items():
        value = getattr(model.vision, ours)
        # The released file omits the sizes that have their default.
        if theirs in vision or ours in _VISION_DEFAULTS or value != getattr(VisionConfig, ours):
            vision[theirs] = _keep_if_equal(vision.get(theirs), value)
    out["vision_config"] = vision
    out["mm_hidden_size"] = model.vision.hidden_size
    out |= {theirs: getattr(model, ours) for theirs, ours in _MODEL_KEYS.items()}
    if base is None:
        out["tokenizer_model_max_length"] = out["original_max_position_embeddings"] = model.decoder.max_positions
    return out


def _require(values: Mapping[str, Any], fixed: Mapping[str, Any], where: str = "") -> None:
    for key, only in fixed.items():
        if values.get(key, only) != only:
            raise ValueError(f"config.json: {where}{key} is {values[key]!r}; this model computes {only!r} only")


def _translate(values: Mapping[str, Any], keys: Mapping[str, str]) -> dict[str, Any]:
    return {ours: values[theirs] for theirs, ours in keys.items() if values.get(theirs) is not None}


def _keep_if_equal(old: Any, new: Any) -> Any:
    """``old`` where it means the same (500000 for 500000.0, [508] for 508)."""
    return old if old == new or old == [new] else new
