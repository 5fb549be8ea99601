"""The architecture as frozen dataclasses.

The defaults are the released Phi-4-reasoning-vision-15B; a smaller model states its differences:

    ModelConfig(decoder=DecoderConfig(num_layers=2, hidden_size=64, ...), ...)

Everything here is hashable, so a config can be a static argument of ``jax.jit`` and part of a plan's hash.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import functools
import math
import re
from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from phivision_jax.io.messages import did_you_mean, shorten

ImageAttention = Literal["causal", "bidirectional"]
NAFLEX, FIXED, EARLY_FUSION = "siglip2", "siglip2_fixed", "early_fusion"  # VisionConfig.encoder
MOST_LAYERS, LARGEST_SIZE = 10_000, 2**24
"""Limits of the number of layers and of any other size: larger numbers are mistakes, and must not be built from."""


def _check_sizes(config: Any, where: str = "") -> None:
    for name, value in vars(config).items():
        most = MOST_LAYERS if name == "num_layers" else LARGEST_SIZE
        if type(value) is int and not name.endswith("token_id") and not 1 <= value <= most:
            raise ValueError(f"{where}{name} must be from 1 to {most:,}, not {shorten(value)}")
        if type(value) is float and not 0 < value < math.inf:
            raise ValueError(f"{where}{name} must be a positive number, not {value}")


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The vision side: a SigLIP-2 encoder (NaFlex, So400m/16 by default), or none.

    ``"siglip2"``        NaFlex: grids of any size, for which the position table is resized
    ``"siglip2_fixed"``  one resolution: every tile is a grid of the table's own size, 27x27 patches of 14 pixels
                         (``tile_size`` 378) or 24x24 of 16 (384). The network is the same; checkpoints differ.
    ``"early_fusion"``   no encoder and no projector: one linear layer from pixels to the decoder's width, which
                         ``hidden_size`` must be. Blocks and their sizes do not exist.

    ``num_layers`` counts the blocks in the checkpoint. The model's features are the output of the block before the
    last (``hidden_states[-2]``), so ``num_layers - 1`` blocks run; the last one, the post-norm and the pooling head
    are carried through checkpoints untouched (``vision_tail``).
    """

    encoder: str = "siglip2"
    """Name of the vision side in ``models.phivision.VISION_SIDES``."""
    hidden_size: int = 1152
    """Width of the encoder."""
    intermediate_size: int = 4304
    """Width inside the MLP."""
    num_layers: int = 27
    """Layers in the checkpoint; the last one is not run."""
    num_heads: int = 16
    """Attention heads."""
    patch_size: int = 16
    """Side of a patch in pixels."""
    num_positions: int = 256
    """Entries of the position table, a square number; it is resized to each image's grid."""
    layer_norm_eps: float = 1e-6
    """Epsilon of the layer norms."""

    def __post_init__(self) -> None:
        _check_sizes(self, "vision.")
        if self.has_blocks and self.hidden_size % self.num_heads:
            raise ValueError(f"vision.hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if self.position_side**2 != self.num_positions:
            raise ValueError(f"vision.num_positions must be a square (rows x columns), not {self.num_positions}")
        if self.num_layers < 2:
            raise ValueError(f"vision.num_layers must be at least 2 (the last block never runs), not {self.num_layers}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def num_active_layers(self) -> int:
        return self.num_layers - 1 if self.has_blocks else 0

    @property
    def has_blocks(self) -> bool:
        """True for an encoder, which has blocks, a vision tail and a projector behind it."""
        return self.encoder != EARLY_FUSION

    @property
    def patch_dim(self) -> int:
        """Numbers in one flattened patch: patch_size² pixels of 3 channels."""
        return self.patch_size**2 * 3

    @property
    def position_side(self) -> int:
        return round(self.num_positions**0.5)

    @property
    def tile_pixels(self) -> int:
        """Side in pixels of the tile whose grid of patches has the position table's size."""
        return self.position_side * self.patch_size


@dataclasses.dataclass(frozen=True)
class ProjectorConfig:
    """Two linear layers with an exact (erf) GELU between them."""

    merge_size: int = 1
    """Vision features concatenated into one vision token: n of ``Batch.merge_index``."""


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Phi-4 decoder: RMSNorm, grouped-query attention, full-width RoPE, SwiGLU, untied head, no biases."""

    vocab_size: int = 100_352
    """Entries of the token embedding and of the head."""
    hidden_size: int = 5120
    """Width of the decoder."""
    intermediate_size: int = 17_920
    """Width inside the MLP."""
    num_layers: int = 40
    """Layers."""
    num_heads: int = 40
    """Query heads."""
    num_kv_heads: int = 10
    """Key and value heads; each serves num_heads / num_kv_heads query heads."""
    rope_theta: float = 500_000.0
    """Base of the rotary embedding's wavelengths."""
    rms_norm_eps: float = 1e-5
    """Epsilon of the RMS norms."""
    max_positions: int = 32_768
    """Longest sequence."""
    bos_token_id: int | None = 100_257
    """Token that begins a text, if there is one."""
    eos_token_id: int = 100_265
    """Token that ends an answer."""
    pad_token_id: int | None = 100_349
    """Token in positions that hold nothing; None: 0 is in these positions."""
    stop_token_ids: tuple[int, ...] = ()
    """Further tokens that end an answer."""

    def __post_init__(self) -> None:
        _check_sizes(self, "decoder.")
        ids = [("bos", self.bos_token_id), ("pad", self.pad_token_id), *(("eos", i) for i in self.stop_ids)]
        for name, i in ids:
            if i is not None and not 0 <= i < self.vocab_size:
                raise ValueError(f"{name}_token_id {shorten(i)} is not in the vocabulary, 0 to {self.vocab_size - 1}")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"decoder.hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"decoder.num_heads {self.num_heads} is no multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"decoder head_dim must be even for RoPE, not {self.head_dim}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """All tokens that end an answer."""
        return self.eos_token_id, *self.stop_token_ids


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The complete model. ``image_attention`` is the decoder's mask inside an image:

    ``"causal"``         what the released code computes (parity);
    ``"bidirectional"``  what the model card describes. Hugging Face's ``config.json`` cannot express it.

    ``min_patches`` and ``max_patches`` bound the NaFlex resize; they belong to the image processor but are part of the
    released ``config.json``, and a model trained at one range is not the same model at another. ``tile_size`` and
    ``max_image_tokens`` are settings of the tiled layouts (``images/tiles.py``).
    """

    vision: VisionConfig = VisionConfig()
    projector: ProjectorConfig = ProjectorConfig()
    decoder: DecoderConfig = DecoderConfig()
    image_attention: ImageAttention = "causal"
    image_layout: str = "naflex"
    """Name of the layout that turns images into patches and vision tokens (``images/layout.py``)."""
    min_patches: int = 256
    """Patches to which NaFlex enlarges smaller images; tiled layouts ignore it."""
    max_patches: int = 3600
    """Most patches of an image, over all of its tiles."""
    tile_size: int = 384
    """Side of a tile in pixels, a multiple of ``vision.patch_size``."""
    max_image_tokens: int | None = None
    """Most vision tokens of an image of a tiled layout; None: the report's cap for that strategy."""

    def __post_init__(self) -> None:
        _check_sizes(self)
        _check_sizes(self.projector, "projector.")
        if self.image_attention not in get_args(ImageAttention):
            raise ValueError(f"image_attention must be one of {get_args(ImageAttention)}, not {self.image_attention!r}")
        if not 0 < self.min_patches <= self.max_patches:
            raise ValueError(f"need 0 < min_patches <= max_patches, not {self.min_patches}, {self.max_patches}")
        width, pixels = self.decoder.hidden_size, self.vision.tile_pixels
        tiles = f"encodes tiles {pixels} pixels wide"
        self._refuse(FIXED, self.image_layout == "naflex", f"{tiles}: choose a layout of tiles, like 'multicrop'")
        self._refuse(FIXED, self.tile_size != pixels, f"{tiles}: set tile_size={pixels}")
        self._refuse(EARLY_FUSION, self.vision.hidden_size != width, f"needs the decoder's width, hidden_size={width}")
        self._refuse(EARLY_FUSION, self.projector.merge_size != 1, "has no projector: set projector.merge_size=1")

    def _refuse(self, encoder: str, found: bool, problem: str) -> None:
        if self.vision.encoder == encoder and found:
            raise ValueError(f"vision.encoder {encoder!r} {problem}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """The inverse of ``dataclasses.asdict``; a misspelt field is an error that names the nearest one."""
        return dataclass_from_dict(cls, values)


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): W + alpha / rank · A · B, of which only A and B train."""

    rank: int = 0
    """Rank of A and B; 0: no adapters, so that the parameters of the model train, according to ``optim.lr_rules``."""
    alpha: float = 32.0
    """Scale of the adapters: A · B is multiplied by alpha / rank."""
    targets: str = r"decoder/layers/.*_proj"
    """Regular expression that selects linear layers by their paths, like ``decoder/layers/mlp/up_proj``."""


class Text(str):
    """A value as text, read by its field's type; ``flag`` is what the user wrote, for errors."""

    flag: str

    def __new__(cls, text: str, flag: str) -> Text:
        self = super().__new__(cls, text)
        self.flag = flag
        return self

    def read(self, hint: Any) -> Any:
        """The value; text that is not of this type is returned unchanged."""
        if hint is not str or self == "None":
            with contextlib.suppress(ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
                return float(self) if hint is float and self != "None" else ast.literal_eval(self)
        return str(self)


field_types = functools.cache(get_type_hints)
"""The type of each field of a dataclass."""


def dataclass_from_dict[T](cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Build a dataclass, and those nested in it, from plain dicts; every value must have its field's type.

    Args:
      where: prefix of the field names in errors, such as ``"optim."``.

    Raises:
      ValueError: for an unknown field (naming the nearest) or a value of another type (naming what is wanted).
    """
    types = field_types(cls)  # type: ignore[arg-type]
    if unknown := [str(name) for name in values if name not in types]:
        hint = did_you_mean(where + unknown[0], [where + name for name in types])
        raise ValueError(f"there is no field {where + shorten(unknown[0])!r}; {hint}")
    needed = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory]  # type: ignore[arg-type]
    if missing := [name for name in needed if name not in values]:
        raise ValueError(f"{where + missing[0]} is missing")
    return cls(**{name: typed(value, types[name], where + name) for name, value in values.items()})


def without_none(hint: Any) -> Any:
    """``T`` of ``T | None`` (the first of several types); any other type unchanged."""
    return get_args(hint)[0] if get_origin(hint) in (Union, UnionType) else hint


def check_types(values: Mapping[str, Any], types: Mapping[str, Any], name: object) -> None:
    """Raises ValueError, beginning with ``name``, if a value is missing or has another type than in ``types``."""
    for key, hint in types.items():
        typed(values.get(key), hint, f"{name}: {key}")


def typed(value: Any, hint: Any, name: str) -> Any:
    """``value`` as a field of this type holds it: lists become tuples, integers floats, dicts dataclasses.

    Raises:
      ValueError: for a value of another type, beginning with ``name``.
    """
    given, optional, hint = value, type(None) in get_args(hint), without_none(hint)
    value = given.read(hint) if isinstance(given, Text) else given
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any or (optional and value is None):
        return value
    if isinstance(value, Mapping) and dataclasses.is_dataclass(hint):
        return dataclass_from_dict(hint, value, f"{name}.")  # type: ignore[arg-type]
    if isinstance(value, Mapping) and origin is Mapping:
        return {key: typed(item, args[1], f"{name}[{shorten(key)!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple) and origin is tuple:
        each = args[:1] * len(value) if args[-1] is Ellipsis else args
        if len(value) == len(each):
            return tuple(typed(item, each[i], f"{name}[{i}]") for i, item in enumerate(value))
    if hint is float and (isinstance(value, float) or (type(value) is int and abs(value) < 2**1023)):
        return float(value)
    if value in args and type(value) is type(args[0]) if origin is Literal else type(value) is hint:
        return value
    prefix = f"{given.flag}: " if isinstance(given, Text) else ""
    shown = shorten(repr(value) if isinstance(value, str) else value)
    raise ValueError(f"{prefix}{name} must be {_wanted(hint)}{' or None' * optional}, not {shown}")


def matching(setting: str, pattern: str, names: Sequence[str], what: str) -> list[str]:
    """The names that a regular expression matches anywhere.

    Args:
      what: the names are those of, for errors.

    Raises:
      ValueError: for a pattern that is not a regular expression or matches none, beginning with ``setting``.
    """
    given = f"{setting}: {shorten(repr(pattern))}"
    try:
        found = [name for name in names if re.search(pattern, name)]
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{given} is not a regular expression: {error}") from None
    if not found:
        near = difflib.get_close_matches(pattern[:100], names, n=1, cutoff=0.0)[0]
        raise ValueError(f"{given} matches no {what} (they look like {near!r})")
    return found


def _wanted(hint: Any) -> str:
    """The values of a type in words, such as "an integer"."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, args))
    if origin is tuple and args[-1] is Ellipsis:
        return f"a list, each item {_wanted(args[0])}"
    if origin is tuple:
        return f"a pair ({', '.join(map(_wanted, args))})"
    words = {int: "an integer", float: "a number", str: "a string", bool: "True or False", bytes: "bytes"}
    return words.get(hint, "a group of fields")
