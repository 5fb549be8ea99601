"""``ModelConfig`` from a Hugging Face ``config.json``, and back.

Each table pairs a Hugging Face key with our field. Keys that a released file omits take the defaults of its model
classes, and keys that would change the arithmetic are refused unless they have the one value that is computed here.

``vision_config.model_type`` names the encoder, as in LLaVA's files. With ``siglip2_vision_model`` (NaFlex) the file is
the released model's, for its remote code. With ``siglip_vision_model``, the class of fixed-resolution SigLIP-2, no
public code reads the complete directory, so the file also states the layout of tiles: ``image_layout`` and
``max_image_tokens``, keys of this project's, and ``mm_hidden_size``, the width of as many features as a token joins.
Tiles have the side of the position table, so where patches do not divide ``image_size`` the rest of a tile, which the
convolution would drop, is not there to begin with.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phivision_jax.checkpoint.layout import COMMAND
from phivision_jax.config import (
    FIXED,
    NAFLEX,
    DecoderConfig,
    ModelConfig,
    ProjectorConfig,
    VisionConfig,
    field_types,
    typed,
)
from phivision_jax.io.messages import prefix_errors, shorten
from phivision_jax.io.read_json import read_json
from phivision_jax.io.storage import Location, check_links, location


def _same(*keys: str) -> dict[str, str]:
    return {key: key for key in keys}


_BOTH = {"num_hidden_layers": "num_layers", "num_attention_heads": "num_heads"}
_BOTH |= _same("hidden_size", "intermediate_size")
_DECODER_KEYS = _BOTH | {"num_key_value_heads": "num_kv_heads", "max_position_embeddings": "max_positions"}
_DECODER_KEYS |= _same("vocab_size", "rope_theta", "rms_norm_eps", "bos_token_id", "pad_token_id")
_VISION_KEYS = {**_BOTH, **_same("patch_size", "layer_norm_eps"), "num_patches": "num_positions"}
_MODEL_KEYS = {"min_num_patches": "min_patches", "max_num_patches": "max_patches"}
# SigLIP-2's class defaults are those of the base model. The other sizes have one default, which is ours too.
_VISION_DEFAULTS = {"hidden_size": 768, "intermediate_size": 3072, "num_layers": 12, "num_heads": 12}
_FIXED_DECODER: dict[str, Any] = {"hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": False}
_FIXED_DECODER |= {"partial_rotary_factor": 1.0, "sliding_window": None}
_FIXED_DECODER |= dict.fromkeys(("attention_dropout", "embd_pdrop", "resid_pdrop"), 0.0)
_FIXED_ROPE = {"rope_type": "default", "type": "default", "factor": 1.0, "partial_rotary_factor": 1.0}
_FIXED_MULTIMODAL = {"mm_projector_type": "mlp2x_gelu", "use_s2": False, "use_mm_proj": True}
_FIXED_VISION = {"hidden_act": "gelu_pytorch_tanh", "num_channels": 3, "attention_dropout": 0.0}
_FIXED_VISION |= {"vision_use_head": True}
_SIGLIP, _IMAGE_SIZE = "siglip_vision_model", 224
"""The class of fixed-resolution encoders, and its default ``image_size``: the side of a tile in pixels. Its position
table has an entry for every complete patch of such a tile."""
GENERATION = "generation_config.json"
_TEMPLATE = Path(__file__).with_name("config_template.json")
"""The other keys that the released model's remote code needs, for a ``config.json`` without a base."""


def expressible(vision: VisionConfig) -> dict[str, Any]:
    """Fields of ``ModelConfig`` that ``config.json`` lacks with this encoder, and the values that the file implies.

    Raises:
      ValueError: for a vision side that no Hugging Face model has.
    """
    if vision.encoder not in (NAFLEX, FIXED):
        problem = "has no Hugging Face form: no model class there takes such patches"
        raise ValueError(f"vision.encoder {vision.encoder!r} {problem}; keep the checkpoint as it is")
    tiles = {} if vision.encoder == FIXED else {"image_layout": "naflex", "projector": ProjectorConfig()}
    return {"image_attention": "causal", **tiles}


def is_hf(path: Location) -> bool:
    """True for a directory with Hugging Face's config.json; a training run has a config.json of its own."""
    return (path / "config.json").is_file() and not (path / COMMAND).is_file()


def model_config(source: Mapping[str, Any] | str | Location) -> ModelConfig:
    """Read the configuration of a released-layout model.

    Args:
      source: the contents of a ``config.json``, its path, or the directory that holds it (all may be ``gs://…``).
        Tokens that end an answer are also read from the ``generation_config.json`` beside it.

    Raises:
      ValueError: when the file asks for something that this model does not compute, naming the key.
    """
    name, values = read_config(source)
    if "vision_config" not in values:
        kind = shorten(values.get("model_type", "unknown"))
        raise ValueError(f"{name} (model_type {kind!r}) has no vision_config: not a Phi-4-reasoning-vision model")
    _require(values, _FIXED_MULTIMODAL, name)
    vision, decoder = vision_config(name, values), decoder_config(name, values)
    given = _translate(name, values, ModelConfig, _MODEL_KEYS)
    if vision.encoder == FIXED:
        given |= _tiles(name, values, vision)
    else:
        _require(values, {"mm_hidden_size": vision.hidden_size}, name)
    with prefix_errors(name):
        return ModelConfig(vision=vision, decoder=decoder, **given)


def _tiles(name: str, values: Mapping[str, Any], vision: VisionConfig) -> dict[str, Any]:
    """The layout of a model with a fixed-resolution encoder, and the features that a token joins."""
    layout = typed(values.get("image_layout"), str | None, f"{name}: image_layout")
    if layout is None:
        raise ValueError(f"{name} has a siglip_vision_model but no image_layout: name the layout of its tiles")
    width = typed(values.get("mm_hidden_size", vision.hidden_size), int, f"{name}: mm_hidden_size")
    if width < 1 or width % vision.hidden_size:
        problem = f"is {shorten(width)}, no multiple of the encoder's hidden_size {vision.hidden_size}"
        raise ValueError(f"{name}: mm_hidden_size {problem}")
    most = typed(values.get("max_image_tokens"), int | None, f"{name}: max_image_tokens")
    given = {"image_layout": layout, "tile_size": vision.tile_pixels, "max_image_tokens": most}
    return given | {"projector": ProjectorConfig(width // vision.hidden_size)}


def read_config(source: Mapping[str, Any] | str | Location) -> tuple[str, Mapping[str, Any]]:
    """A file's name and contents; ``eos_token_id`` is a list that includes those of ``generation_config.json``."""
    if isinstance(source, Mapping):
        return "config.json", {**source, "eos_token_id": _stop_ids("config.json", source)}
    path = location(source)
    if path.is_dir():
        check_links(path)
        path = path / "config.json"
    name, values, generation = str(path), read_json(path), path.with_name(GENERATION)
    stops = _stop_ids(name, values)
    if generation.is_file():
        more, size = _stop_ids(str(generation), read_json(generation)), values.get("vocab_size")
        if beyond := [i for i in more if i < 0 or (isinstance(size, int) and i >= size)]:
            raise ValueError(f"{generation}: eos_token_id {shorten(beyond[0])} is not in the vocabulary")
        stops += more
    return name, {**values, "eos_token_id": [*dict.fromkeys(stops)]}


def _stop_ids(name: str, values: Mapping[str, Any]) -> list[int]:
    """The ids of ``eos_token_id``, which may be a list, a number or null."""
    ids = values.get("eos_token_id")
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    return [*typed(ids, tuple[int, ...], f"{name}: eos_token_id")]


def decoder_config(name: str, values: Mapping[str, Any]) -> DecoderConfig:
    """The decoder of a released model or of a text-only Phi-4; raises ValueError as ``model_config``."""
    _require(values, _FIXED_DECODER, name)
    known = _translate(name, values, DecoderConfig, _DECODER_KEYS)
    for key in ("rope_scaling", "rope_parameters"):  # of transformers 4 and 5
        rope = typed(values.get(key) or {}, Mapping[str, Any], f"{name}: {key}")
        _require(rope, _FIXED_ROPE, f"{name}: {key}")
    if missing := {"hidden_size", "num_layers", "num_heads"} - known.keys():
        raise ValueError(f"{name} has no decoder {min(missing)}: not a Phi-4 configuration")
    if not (stops := values["eos_token_id"]):
        raise ValueError(f"{name} has no eos_token_id, the token that ends an answer")
    # For bos and pad, null and missing mean none.
    defaults = {"num_kv_heads": known["num_heads"], "rope_theta": 1e4, "bos_token_id": None, "pad_token_id": None}
    known = {**defaults, **known, "eos_token_id": stops[0], "stop_token_ids": tuple(stops[1:])}
    known |= _translate(name, rope, DecoderConfig, _same("rope_theta"))
    with prefix_errors(name):
        return DecoderConfig(**known)


def vision_config(name: str, values: Mapping[str, Any]) -> VisionConfig:
    """The encoder of a released model or of a SigLIP-2 checkpoint; raises ValueError as ``model_config``."""
    values = typed(values.get("vision_config", values), Mapping[str, Any], f"{name}: vision_config")
    where = f"{name}: vision_config"
    _require(values, _FIXED_VISION, where)
    given = {**_VISION_DEFAULTS, **_translate(name, values, VisionConfig, _VISION_KEYS)}
    if values.get("model_type") == _SIGLIP:
        size = typed(values.get("image_size", _IMAGE_SIZE), int, f"{where}: image_size")
        with prefix_errors(name):
            sized = VisionConfig(encoder=FIXED, **given)
            return dataclasses.replace(sized, num_positions=(size // sized.patch_size) ** 2)
    with prefix_errors(name):
        return VisionConfig(**given)


def config_json(model: ModelConfig, base: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The contents of this model's ``config.json``.

    Args:
      base: a ``config.json`` to update; its other keys, and the spelling of equal values, are kept.

    Raises:
      ValueError: when ``config.json`` cannot express this model, see ``expressible``.
    """
    for field, only in expressible(model.vision).items():
        if (value := getattr(model, field)) != only:
            raise ValueError(f"config.json cannot express {field}={value!r}: Hugging Face code computes {only!r}")
    out: dict[str, Any] = read_json(_TEMPLATE) if base is None else dict(base)
    rope = out.get("rope_parameters")
    for theirs, ours in _DECODER_KEYS.items():
        value = getattr(model.decoder, ours)
        if theirs == "rope_theta" and isinstance(rope, Mapping):
            out["rope_parameters"] = {**rope, "rope_theta": value}
        elif value is not None or theirs in out:
            out[theirs] = _keep_if_equal(out.get(theirs), value)
    stops = [*model.decoder.stop_ids]
    old = out.get("eos_token_id")  # it may name fewer: the others are in generation_config.json
    if not (old and {*(old if isinstance(old, list) else [old])} <= {*stops}):
        out["eos_token_id"] = stops if len(stops) > 1 else stops[0]
    out["vision_config"] = _vision_json(model.vision, out.get("vision_config") or {})
    out["mm_hidden_size"] = model.projector.merge_size * model.vision.hidden_size
    out |= {theirs: getattr(model, ours) for theirs, ours in _MODEL_KEYS.items()}
    if model.vision.encoder == FIXED:
        out["image_layout"] = model.image_layout
        if model.max_image_tokens is not None or "max_image_tokens" in out:
            out["max_image_tokens"] = model.max_image_tokens
        if base is None:  # the template names the released remote code, which has another encoder
            out = {key: value for key, value in out.items() if key not in ("architectures", "mm_vision_tower")}
    if base is None:
        out["tokenizer_model_max_length"] = out["original_max_position_embeddings"] = model.decoder.max_positions
    return out


def _vision_json(vision: VisionConfig, base: Mapping[str, Any]) -> dict[str, Any]:
    """``vision_config`` of this encoder, with the other keys and the spelling of ``base``."""
    out, keys = dict(base), dict(_VISION_KEYS)
    if vision.encoder == FIXED:
        out["model_type"] = _SIGLIP
        del keys["num_patches"]
        if out.get("image_size", _IMAGE_SIZE) // vision.patch_size != vision.position_side:
            out["image_size"] = vision.position_side * vision.patch_size
    for theirs, ours in keys.items():
        value = getattr(vision, ours)
        # The released file omits the sizes that have their default.
        if theirs in out or ours in _VISION_DEFAULTS or value != getattr(VisionConfig, ours):
            out[theirs] = _keep_if_equal(out.get(theirs), value)
    return out


def generation_json(model: ModelConfig) -> dict[str, Any]:
    """The contents of a ``generation_config.json``."""
    ids = {"bos_token_id": model.decoder.bos_token_id, "pad_token_id": model.decoder.pad_token_id}
    return {"_from_model_config": True, **ids, "eos_token_id": [*model.decoder.stop_ids]}


def _require(values: Mapping[str, Any], fixed: Mapping[str, Any], where: str) -> None:
    for key, only in fixed.items():
        if values.get(key, only) != only:
            raise ValueError(f"{where}: {key} is {shorten(values[key])}; this model computes {only!r} only")


def _translate(name: str, values: Mapping[str, Any], cls: type, keys: Mapping[str, str]) -> dict[str, Any]:
    types, given = field_types(cls), ((theirs, ours, values.get(theirs)) for theirs, ours in keys.items())
    return {ours: typed(v, types[ours], f"{name}: {theirs}") for theirs, ours, v in given if v is not None}


def _keep_if_equal(old: Any, new: Any) -> Any:
    """``old`` where it means the same (500000 for 500000.0, [508] for 508)."""
    return old if old == new or old == [new] else new
