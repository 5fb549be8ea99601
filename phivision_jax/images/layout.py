"""Image layouts: how an image becomes patches for the vision encoder, and its features become vision tokens.

    image ──measure──► grids of its tiles, number of patches, number of tokens       arithmetic on width and height
    image ──encode───► patches of the tiles ──► features ──merge tables──► tokens    patches on the host, the rest on
                                                                                     the device

A tile is a grid of patches that attend to each other; an image has one or several. The tokens of an image are its
features, or weighted sums and concatenations of them, as rows of merge tables (``batch.Batch``).

``ModelConfig.image_layout`` names the layout. NaFlex, the released one, has one tile and a token per patch; the other
strategies of the report are built on ``images/tiles.py`` (docs/image_strategies.md compares them). To add another,
subclass ``ImageLayout`` and register it, in a module ``phivision_jax/images/<name>.py`` or any other that is imported
before the model's processor is made, such as the file of a run's configuration:

    @register_layout("thumbnail")
    class Thumbnail(ImageLayout):
        merge = (1, 4)  # every token is the mean of 4 features
        ...
"""

import abc
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from PIL.Image import Image

from phivision_jax.config import ModelConfig
from phivision_jax.io.messages import did_you_mean

type Box = tuple[float, float, float, float]
"""Left, top, right and bottom edge of a part of an image, in pixels of the image as given."""

STRATEGIES = ("naflex", "multicrop", "s2", "multicrop_s2", "dynamic_s2")
"""Layouts in this folder."""


class ImageSize(NamedTuple):
    """The size of an image after its layout."""

    grids: tuple[tuple[int, int], ...]
    """Rows and columns of patches of each tile."""
    tokens: int
    """Vision tokens of the image."""

    @property
    def patches(self) -> int:
        return sum(rows * columns for rows, columns in self.grids)


@dataclasses.dataclass(frozen=True)
class PatchedImage:
    """An image as the encoder takes it."""

    patches: np.ndarray
    """[n, patch²·3] u8: tile after tile, each row by row over its grid."""
    grids: tuple[tuple[int, int], ...]
    """Rows and columns of patches of each tile."""
    merge_index: np.ndarray | None = None
    """[tokens, n, k] i32: numbers of patches of this image, −1 for none; None where every patch is a token."""
    merge_weight: np.ndarray | None = None
    """[tokens, n, k] f32."""

    def __post_init__(self) -> None:
        if self.patches.ndim != 2 or len(self.patches) != sum(rows * columns for rows, columns in self.grids):
            grids = " and ".join(f"{rows}x{columns}" for rows, columns in self.grids)
            raise ValueError(f"patches {self.patches.shape} do not fill a grid of {grids}")
        if self.patches.dtype != np.uint8:
            raise ValueError(f"patches are {self.patches.dtype}; give raw pixels as uint8, the model normalizes them")

    @property
    def tiles(self) -> list[np.ndarray]:
        """Patches of each tile as its grid, [rows, columns, patch²·3] u8."""
        ends = np.cumsum([rows * columns for rows, columns in self.grids])[:-1]
        tiles = zip(np.split(self.patches, ends), self.grids, strict=True)
        return [patches.reshape(*grid, -1) for patches, grid in tiles]

    @property
    def size(self) -> ImageSize:
        return ImageSize(self.grids, len(self.patches if self.merge_index is None else self.merge_index))

    @functools.cached_property
    def key(self) -> int:
        """A hash of everything that decides the image's vision tokens, 62 bits."""
        digest = hashlib.blake2b(repr(self.grids).encode(), digest_size=8)
        for array in (self.patches, self.merge_index, self.merge_weight):
            digest.update(b"" if array is None else np.ascontiguousarray(array).tobytes())
        return int.from_bytes(digest.digest(), "little") >> 2

    @functools.cached_property
    def identity(self) -> np.ndarray:
        """[tokens] i64: a negative number for each vision token, made of ``key`` and the token's number."""
        return -1 - (self.key + np.arange(self.size.tokens)) % 2**62


class ImageLayout(abc.ABC):
    """Base of all layouts: ``measure``, ``encode``, and what must be known to merge features.

    Sizes follow from width and height alone, so that rows can be planned without opening an image: ``encode`` gives
    exactly the grids and tokens of ``measure``. ``max_patches`` asks for fewer patches than the model's, for
    images that would not fit a row; a layout of a fixed size may ignore it.
    """

    merge: tuple[int, int] | None = None
    """(n, k) of the merge tables: a token is the concatenation of n weighted sums of k features, where n is
    ``projector.merge_size``. None where every patch is a token."""

    @classmethod
    def configure(cls, config: ModelConfig, cap: int | None = None) -> ModelConfig:
        """A model's configuration for this layout, as ``with_layout`` returns it; ``cap``: most tokens of an image."""
        most = cap or config.max_patches
        least = min(config.min_patches, most)
        return dataclasses.replace(config, max_patches=most, min_patches=least, max_image_tokens=None)

    def __init__(self, config: ModelConfig) -> None:
        self.name, self.patch_size = config.image_layout, config.vision.patch_size
        self.min_patches, self.max_patches = config.min_patches, config.max_patches

    @abc.abstractmethod
    def measure(self, width: int, height: int, max_patches: int | None = None) -> ImageSize:
        """The size of an image of this many pixels."""

    @abc.abstractmethod
    def encode(self, image: Image, max_patches: int | None = None) -> PatchedImage:
        """The patches of an image, and its merge rows.

        Raises:
          ValueError: for an image without pixels, or of a mode that has no conversion to RGB.
        """

    def measure_all(self, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Patches and tokens of many images: ``measure`` of [I, 2] widths and heights, as two arrays [I] of i64."""
        distinct, inverse = np.unique(np.asarray(sizes, np.int64).reshape(-1, 2), axis=0, return_inverse=True)
        measured = [self.measure(width, height) for width, height in distinct.tolist()]
        counts = np.array([(size.patches, size.tokens) for size in measured], np.int64).reshape(-1, 2)[inverse]
        return counts[:, 0], counts[:, 1]

    def max_tokens(self, num_patches: int) -> int:
        """The most tokens that images of this many patches in total can have: bounds the merge tables of a row."""
        return num_patches

    def boxes(self, width: int, height: int) -> list[Box]:
        """The part of an image that each tile shows; default: all of it."""
        return [(0.0, 0.0, float(width), float(height))] * len(self.measure(width, height).grids)

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height in pixels after resizing, at the finest scale; default: those of the last tile."""
        rows, columns = self.measure(width, height).grids[-1]
        return columns * self.patch_size, rows * self.patch_size

    @property
    def fingerprint(self) -> dict[str, Any]:
        """JSON values that tell two layouts apart: equal ones give equal patches and tokens for every image."""
        return {name: getattr(self, name) for name in ("name", "patch_size", "min_patches", "max_patches")}

    def blank(self, size: ImageSize) -> PatchedImage:
        """A black image of the given size, whose merged tokens are zero."""
        patches = np.zeros((size.patches, self.patch_size**2 * 3), np.uint8)
        if self.merge is None:
            return PatchedImage(patches, size.grids)
        table = (size.tokens, *self.merge)
        return PatchedImage(patches, size.grids, np.full(table, -1, np.int32), np.zeros(table, np.float32))


_LAYOUTS: dict[str, type[ImageLayout]] = {}


def register_layout[L: type[ImageLayout]](name: str) -> Callable[[L], L]:
    """A decorator for layout classes, which ``ModelConfig.image_layout`` then selects by ``name``."""

    def register(layout: L) -> L:
        _LAYOUTS[name] = layout
        return layout

    return register


def make_layout(config: ModelConfig) -> ImageLayout:
    """The layout that a model is configured with.

    Raises:
      ValueError: when none of that name is registered, its merge tables do not fit the projector, or it does not fit
        the sizes of patches, tiles and images.
    """
    name = config.image_layout
    layout = _registered(name)(config)
    merged = layout.merge[0] if layout.merge else 1
    if merged != config.projector.merge_size:
        problem = f"but projector.merge_size is {config.projector.merge_size}; make them equal"
        raise ValueError(f"image_layout {name!r} concatenates {merged} features into a token, {problem}")
    return layout


def with_layout(config: ModelConfig, strategy: str) -> ModelConfig:
    """A model's configuration with another layout, and the projector's width and the limits that follow from it.

    Args:
      config: of any layout.
      strategy: name of a layout, or ``NAME:CAP`` with the most tokens of an image, like ``"naflex:2048"``.

    Raises:
      ValueError: for a name that is not registered, or a cap that the layout cannot keep.
    """
    name, _, cap = strategy.partition(":")
    if cap and not cap.isdecimal():
        raise ValueError(f"strategy {strategy!r}: the cap after the colon is a number of tokens, not {cap!r}")
    layout = _registered(name)
    projector = dataclasses.replace(config.projector, merge_size=layout.merge[0] if layout.merge else 1)
    config = dataclasses.replace(config, image_layout=name, projector=projector)
    return layout.configure(config, int(cap) if cap else None)


def _registered(name: str) -> type[ImageLayout]:
    module = f"{__package__}.{name}"
    if name not in _LAYOUTS and name.isidentifier() and importlib.util.find_spec(module):
        importlib.import_module(module)
    if name not in _LAYOUTS:
        hint = did_you_mean(name, sorted({*STRATEGIES, *_LAYOUTS}))
        raise ValueError(f"image_layout {name!r} is not registered (to add it, put it in {module}): {hint}")
    return _LAYOUTS[name]
