"""The architecture as frozen dataclasses, and its two-way translation to a Hugging Face ``config.json``.

The defaults are the released Phi-4-reasoning-vision-15B; a smaller model states its differences:

    ModelConfig(decoder=DecoderConfig(num_layers=2, hidden_size=64, ...), ...)

Everything here is hashable, so a config can be a static argument of ``jax.jit`` and part of a plan's hash.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

from phivision_jax.io.storage import Location, explained, location

ImageAttention = Literal["causal", "bidirectional"]


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """SigLIP-2 NaFlex encoder (So400m/16 by default).

    ``num_layers`` counts the blocks in the checkpoint. The model's features are the output of the block before the
    last (``hidden_states[-2]``), so ``num_layers - 1`` blocks run; the last one, the post-norm and the pooling head
    are carried through checkpoints untouched (``vision_tail``).
    """

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_layers: int = 27
    num_heads: int = 16
    patch_size: int = 16
    num_positions: int = 256
    layer_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"vision.hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if self.position_side**2 != self.num_positions:
            raise ValueError(
                f"vision.num_positions must be a square (a table of rows x columns), not {self.num_positions}"
            )
        if self.num_layers < 2:
            raise ValueError(f"vision.num_layers must be at least 2 (the last block never runs), not {self.num_layers}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def num_active_layers(self) -> int:
        return self.num_layers - 1

    @property
    def patch_dim(self) -> int:
        """Numbers in one flattened patch: patch_size² pixels of 3 channels."""
        return self.patch_size**2 * 3

    @property
    def position_side(self) -> int:
        return round(self.num_positions**0.5)


@dataclasses.dataclass(frozen=True)
class ProjectorConfig:
    """Two linear layers with an exact (erf) GELU between them.

    ``merge_size`` is G of ``Batch.merge_index``: how many vision features one vision token is concatenated from.
    """

    merge_size: int = 1


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Phi-4 decoder: RMSNorm, grouped-query attention, full-width RoPE, SwiGLU, untied head, no biases."""

    vocab_size: int = 100_352
    hidden_size: int = 5120
    intermediate_size: int = 17_920
    num_layers: int = 40
    num_heads: int = 40
    num_kv_heads: int = 10
    rope_theta: float = 500_000.0
    rms_norm_eps: float = 1e-5
    max_positions: int = 32_768
    bos_token_id: int = 100_257
    eos_token_id: int = 100_265
    pad_token_id: int = 100_349

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"decoder.hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"decoder.num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"decoder head_dim must be even for RoPE, not {self.head_dim}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The whole model. ``image_attention`` is the decoder's mask inside an image:

    ``"causal"``         what the released code computes (parity);
    ``"bidirectional"``  what the model card describes. Hugging Face's ``config.json`` cannot express it.

    ``min_patches`` and ``max_patches`` bound the NaFlex resize; they belong to the image processor but stand in the
    released ``config.json``, and a model trained at one range is not the same model at another.
    """

    vision: VisionConfig = VisionConfig()
    projector: ProjectorConfig = ProjectorConfig()
    decoder: DecoderConfig = DecoderConfig()
    image_attention: ImageAttention = "causal"
    min_patches: int = 256
    max_patches: int = 3600

    def __post_init__(self) -> None:
        if self.image_attention not in get_args(ImageAttention):
            raise ValueError(f"image_attention must be one of {get_args(ImageAttention)}, not {self.image_attention!r}")
        if not 0 < self.min_patches <= self.max_patches:
            raise ValueError(f"need 0 < min_patches <= max_patches, not {self.min_patches}, {self.max_patches}")

    @classmethod
    def from_hf(cls, config: Mapping[str, Any] | str | Location) -> ModelConfig:
        """Read a Hugging Face ``config.json`` (its dict, its path, or the directory that holds it).

        Raises:
          ValueError: when the file asks for something this model does not compute, naming the key.
        """
        return from_hf(config)

    def to_hf(self, base: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The ``config.json`` of this model: ``base`` (a released one, say) with every key we know set from ``self``.

        Raises:
          ValueError: when ``config.json`` cannot express this model (``image_attention="bidirectional"``, merging).
        """
        return to_hf(self, base)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """The inverse of ``dataclasses.asdict``; a misspelt field is an error that names the nearest one."""
        return dataclass_from_dict(cls, values)


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): W + alpha / rank · A · B, of which only A and B train."""

    rank: int = 0
    """Rank of A and B; 0 for no adapters: the model itself trains, as ``optim.lr_rules`` say."""
    alpha: float = 32.0
    """Scale of the adapters: A · B is multiplied by alpha / rank."""
    targets: str = r"decoder/layers/.*_proj"
    """Regular expression that selects linear layers by their paths, like ``decoder/layers/mlp/up_proj``."""


def dataclass_from_dict[T](cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Build a (nested) dataclass from plain dicts, refusing names it does not have.

    Raises:
      ValueError: for an unknown field, with the closest known name; for a value that is not among a field's choices.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in values:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(fields)}"
            raise ValueError(f"{cls.__name__} has no field {where + name!r}{hint}")
    kwargs, hints = {}, get_type_hints(cls)
    for name, value in values.items():
        default = fields[name].default
        if dataclasses.is_dataclass(default) and isinstance(value, Mapping):
            value = dataclass_from_dict(type(default), value, f"{where}{name}.")
        elif isinstance(default, tuple) and isinstance(value, list):
            value = tuple(tuple(v) if isinstance(v, list) else v for v in value)
        choices = get_args(hints[name]) if get_origin(hints[name]) is Literal else ()
        if choices and value not in choices:
            raise ValueError(f"{where}{name} must be one of {', '.join(map(repr, choices))}, not {value!r}")
        kwargs[name] = value
    return cls(**kwargs)


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face. Each row: their key, our field. Keys absent from a released file take the defaults of its model classes.

_TEXT_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "rope_theta": "rope_theta",
    "rms_norm_eps": "rms_norm_eps",
    "max_position_embeddings": "max_positions",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
}
_VISION_KEYS = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "patch_size": "patch_size",
    "num_patches": "num_positions",
    "layer_norm_eps": "layer_norm_eps",
}
# Keys whose other values would change the arithmetic: (path, the only value computed here).
_FIXED_TEXT = {
    "hidden_act": "silu",
    "attention_bias": False,
    "partial_rotary_factor": 1.0,
    "rope_scaling": None,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
}
_FIXED_MULTIMODAL = {"mm_projector_type": "mlp2x_gelu", "use_s2": False, "use_mm_proj": True}
_FIXED_VISION = {"hidden_act": "gelu_pytorch_tanh", "num_channels": 3, "attention_dropout": 0.0}
# What the remote code of the released model needs besides, for a config.json written from nothing.
_RELEASED_EXTRAS = {
    "architectures": ["Phi4ForCausalLMV"],
    "model_type": "phi4-siglip",
    "image_aspect_ratio": "square",
    "initializer_range": 0.02,
    "mm_vision_tower": "google/siglip2-so400m-patch16-naflex",
    "tokenizer_padding_side": "right",
    "unfreeze_vision_tower": True,
    "tune_mm_mlp_adapter": False,
    "freeze_mm_mlp_adapter": False,
    "use_cache": True,
}


def read_json(path: Location) -> dict[str, Any]:
    """A JSON file as a dict, with errors that name the file."""
    try:
        with explained(path):
            return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def _require(values: Mapping[str, Any], fixed: Mapping[str, Any], where: str) -> None:
    for key, only in fixed.items():
        if key in values and values[key] != only:
            raise ValueError(f"config.json: {where}{key} is {values[key]!r}; this model computes {only!r} only")


def decoder_from_hf(values: Mapping[str, Any]) -> DecoderConfig:
    """The decoder's part of a released ``config.json``, or all of a text-only Phi-4's."""
    _require(values, _FIXED_TEXT, "")
    known = {ours: values[theirs] for theirs, ours in _TEXT_KEYS.items() if values.get(theirs) is not None}
    # transformers 5 writes RoPE settings as one dict.
    rope = values.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"config.json: rope_parameters is {rope!r}; this model computes plain full-width RoPE only")
    if "rope_theta" in rope:
        known["rope_theta"] = rope["rope_theta"]
    for key in ("hidden_size", "num_layers", "num_heads"):
        if key not in known:
            raise ValueError(f"config.json has no decoder {key}: not a Phi-4 configuration")
    known.setdefault("num_kv_heads", known["num_heads"])
    known["rope_theta"] = float(known.get("rope_theta", 10_000.0))
    if isinstance(known.get("eos_token_id"), list):
        known["eos_token_id"] = known["eos_token_id"][0]
    return DecoderConfig(**known)


def vision_from_hf(values: Mapping[str, Any]) -> VisionConfig:
    """A ``vision_config`` of a released ``config.json`` or of a SigLIP-2 checkpoint."""
    _require(values, _FIXED_VISION, "vision_config.")
    # SigLIP-2's class defaults are the base model's, and every size the released file omits has this one default.
    base = {"hidden_size": 768, "intermediate_size": 3072, "num_layers": 12, "num_heads": 12}
    known = {ours: values[theirs] for theirs, ours in _VISION_KEYS.items() if values.get(theirs) is not None}
    return VisionConfig(**{**base, **known})


def from_hf(config: Mapping[str, Any] | str | Location) -> ModelConfig:
    if not isinstance(config, Mapping):
        path = location(config)
        config = read_json(path / "config.json" if path.is_dir() else path)
    if "vision_config" not in config:
        kind = config.get("model_type", "unknown")
        raise ValueError(
            f"config.json (model_type {kind!r}) has no vision_config: not a Phi-4-reasoning-vision checkpoint"
        )
    _require(config, _FIXED_MULTIMODAL, "")
    vision, decoder = vision_from_hf(config["vision_config"]), decoder_from_hf(config)
    if config.get("mm_hidden_size", vision.hidden_size) != vision.hidden_size:
        raise ValueError(
            f"config.json: mm_hidden_size is {config['mm_hidden_size']}, vision_config.hidden_size {vision.hidden_size}"
        )
    return ModelConfig(
        vision=vision,
        decoder=decoder,
        min_patches=config.get("min_num_patches", ModelConfig.min_patches),
        max_patches=config.get("max_num_patches", ModelConfig.max_patches),
    )


def to_hf(model: ModelConfig, base: Mapping[str, Any] | None = None) -> dict[str, Any]:
    if model.image_attention != "causal":
        raise ValueError(
            f"config.json cannot say image_attention={model.image_attention!r}: Hugging Face code would run this model "
            "with a causal mask and give other answers"
        )
    if model.projector.merge_size != 1:
        raise ValueError(f"config.json cannot say projector.merge_size={model.projector.merge_size}")
    out: dict[str, Any] = dict(base) if base is not None else {**_RELEASED_EXTRAS, **_FIXED_TEXT, **_FIXED_MULTIMODAL}
    has_rope_dict = isinstance(out.get("rope_parameters"), Mapping)
    for theirs, ours in _TEXT_KEYS.items():
        value = getattr(model.decoder, ours)
        if theirs == "rope_theta" and has_rope_dict:
            out["rope_parameters"] = {**out["rope_parameters"], "rope_theta": value}
        else:
            out[theirs] = _keep_if_equal(out.get(theirs), value)
    given = dict(out.get("vision_config") or {"model_type": "siglip2_vision_model"})
    defaults = VisionConfig()
    for theirs, ours in _VISION_KEYS.items():
        value = getattr(model.vision, ours)
        omitted = theirs in ("patch_size", "num_patches", "layer_norm_eps") and value == getattr(defaults, ours)
        if theirs in given or not omitted:
            given[theirs] = _keep_if_equal(given.get(theirs), value)
    out["vision_config"] = given
    out["mm_hidden_size"] = model.vision.hidden_size
    out["min_num_patches"], out["max_num_patches"] = model.min_patches, model.max_patches
    if base is None:
        out["tokenizer_model_max_length"] = out["original_max_position_embeddings"] = model.decoder.max_positions
    return out


def _keep_if_equal(old: Any, new: Any) -> Any:
    """Keep the file's spelling (500000 for 500000.0, [508] for 508) where it means the same."""
    return old if old == new or old == [new] else new
