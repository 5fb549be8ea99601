"""Square tiles of a fixed size: the base of the report's tiled strategies.

    image ─► canvas: its size after resizing ─► crops ─► each crop at several scales, cut into tiles ─► encoder
          ─► features of each scale stitched, pooled to one grid, their channels side by side ─► tokens, row by row

A crop at scales 1x1 and 2x2 with 4 features (2x2) per tile, pooled to the grid of the first scale:

    tiles    ┌─────┐  ┌──┬──┐      features   0 1    4  5 │ 8  9
             │  0  │  │ 1│ 2│                 2 3    6  7 │10 11     token 0 = [f0, mean(f4, f5, f6, f7)]
             │     │  ├──┼──┤                        ─────┼─────     token 1 = [f1, mean(f8, f9, f10, f11)]
             └─────┘  │ 3│ 4│                        12 13│16 17     …
                      └──┴──┘                        14 15│18 19

Each tile is resized from the image as given, by Pillow's antialiased bicubic filter, to u8. Pixels next to a tile count
at its edges, so this equals cutting the resized image. No tile is padded: where an image does not have the shape of its
tiles it is stretched, because padding would spend tokens on nothing.
"""

import abc
import dataclasses
import functools
from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple

import einops
import numpy as np
from PIL import Image

from phivision_jax.config import LARGEST_SIZE, ModelConfig
from phivision_jax.images.decode import to_rgb
from phivision_jax.images.layout import Box, ImageLayout, ImageSize, PatchedImage
from phivision_jax.images.pooling import Grid, Tables, crop_tables


class Tiling(NamedTuple):
    """The tiles of an image: crops of its canvas, row by row, each with the same scales."""

    canvas: tuple[int, int]
    """Width and height of the resized image in pixels."""
    square: tuple[int, int]
    """Width and height of a crop, in pixels of the canvas."""
    crops: Grid
    """Rows and columns of crops; neighbours overlap where the canvas is no multiple of a crop."""
    scales: tuple[Grid, ...]
    """Rows and columns of tiles of each scale of a crop."""

    @property
    def num_crops(self) -> int:
        return self.crops[0] * self.crops[1]

    @property
    def tiles_per_crop(self) -> int:
        return sum(rows * columns for rows, columns in self.scales)

    def boxes(self, width: int, height: int) -> list[Box]:
        """Part of a ``width`` x ``height`` image in each tile: crop by crop, scale by scale, row by row."""
        # Edges are fractions of integers, rounded once: the last edge is exactly the image's.
        lefts, tops = (
            [k * (canvas - square) // max(1, count - 1) for k in range(count)]
            for canvas, square, count in zip(self.canvas, self.square, self.crops[::-1], strict=True)
        )

        def edge(side: int, axis: int, first: int, part: int, parts: int) -> float:
            return side * (first * parts + self.square[axis] * part) / (self.canvas[axis] * parts)

        return [
            (
                edge(width, 0, left, column, columns),
                edge(height, 1, top, row, rows),
                edge(width, 0, left, column + 1, columns),
                edge(height, 1, top, row + 1, rows),
            )
            for top in tops
            for left in lefts
            for rows, columns in self.scales
            for row in range(rows)
            for column in range(columns)
        ]


class TiledLayout(ImageLayout):
    """Base of layouts whose tiles are squares of ``ModelConfig.tile_size``.

    A subclass states ``merge`` and ``report_cap``, and chooses the tiles and the grid of tokens.

    Raises:
      ValueError: when a tile is no multiple of a patch, or the smallest image exceeds the limits.
    """

    report_cap: ClassVar[int]
    """Most tokens of an image in the report."""
    block: ClassVar[int] = 1
    """Side of the square of features that space-to-channel joins into a token."""
    bilinear: ClassVar[bool] = False
    """Features are interpolated to the grid of tokens, not averaged over areas."""
    merge: tuple[int, int]

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.tile_size, self.cap = config.tile_size, config.max_image_tokens or self.report_cap
        self.side, beyond = divmod(self.tile_size, self.patch_size)
        if beyond or not self.side:
            problem = f"tile_size {self.tile_size} is no multiple of vision.patch_size {self.patch_size}"
            fitting = max(1, self.side) * self.patch_size
            raise ValueError(f"{problem}, so pixels would be left out: set tile_size={fitting}")
        least = self.measure(1, 1)
        for needed, limit, field in (
            (least.patches, self.max_patches, "max_patches"),
            (least.tokens, self.cap, "max_image_tokens"),
        ):
            if needed > limit:
                problem = f"{needed:,} for its smallest image, and {field} is {limit:,}"
                raise ValueError(f"image_layout {self.name!r} with tiles of {self.tile_size} pixels needs {problem}")
        self.min_patches = least.patches  # the lowest limit that measure can keep

    @classmethod
    def configure(cls, config: ModelConfig, cap: int | None = None) -> ModelConfig:
        config = dataclasses.replace(config, max_image_tokens=cap, max_patches=LARGEST_SIZE)
        most = max(size.patches for size in cls(config)._sizes)
        return dataclasses.replace(config, max_patches=most, min_patches=min(config.min_patches, most))

    @abc.abstractmethod
    def most_parts(self, max_patches: int) -> int:
        """Most crops that an image may be cut into, or most tiles of a grid that follows its shape."""

    @abc.abstractmethod
    def divide(self, width: int, height: int, most: int) -> Tiling:
        """The tiles of an image of this many pixels, with at most ``most`` such parts."""

    @abc.abstractmethod
    def tilings(self, most: int) -> Iterable[Tiling]:
        """At least one tiling of every size in patches and tokens."""

    @abc.abstractmethod
    def token_grid(self, tiling: Tiling) -> Grid:
        """Rows and columns of the pooled features of a crop, before space-to-channel."""

    def tiling(self, width: int, height: int, max_patches: int | None = None) -> Tiling:
        """The tiles of an image; at least one part, however low ``max_patches`` is."""
        if min(width, height) < 1:
            raise ValueError(f"an image of {width}x{height} pixels has no patches")
        limit = min(max_patches or self.max_patches, self.max_patches)
        return self.divide(width, height, max(1, self.most_parts(limit)))

    def measure(self, width: int, height: int, max_patches: int | None = None) -> ImageSize:
        return self._size(self.tiling(width, height, max_patches))

    def encode(self, image: Image.Image, max_patches: int | None = None) -> PatchedImage:
        tiling, rgb, size = self.tiling(*image.size, max_patches), to_rgb(image), (self.tile_size, self.tile_size)
        tiles = [rgb.resize(size, Image.Resampling.BICUBIC, box) for box in tiling.boxes(*image.size)]
        patches = einops.rearrange(
            np.stack([np.asarray(tile) for tile in tiles]),
            "tiles (r h) (c w) rgb -> (tiles r c) (h w rgb)",
            r=self.side,
            c=self.side,
        )
        return PatchedImage(np.ascontiguousarray(patches), self._size(tiling).grids, *self._tables(tiling))

    def boxes(self, width: int, height: int) -> list[Box]:
        return self.tiling(width, height).boxes(width, height)

    def resized(self, width: int, height: int) -> tuple[int, int]:
        return self.tiling(width, height).canvas

    def max_tokens(self, num_patches: int) -> int:
        return max(size.tokens * num_patches // size.patches for size in self._sizes)

    @property
    def fingerprint(self) -> dict[str, Any]:
        return super().fingerprint | {"tile_size": self.tile_size, "max_image_tokens": self.cap}

    @functools.cached_property
    def _sizes(self) -> list[ImageSize]:
        """Every size that an image can have."""
        return [self._size(tiling) for tiling in self.tilings(max(1, self.most_parts(self.max_patches)))]

    def _size(self, tiling: Tiling) -> ImageSize:
        rows, columns = (-(-count // self.block) for count in self.token_grid(tiling))
        grids = ((self.side, self.side),) * (tiling.num_crops * tiling.tiles_per_crop)
        return ImageSize(grids, tiling.num_crops * rows * columns)

    def _tables(self, tiling: Tiling) -> Tables:
        """Merge tables of all crops; the features of a crop follow those of the one before."""
        index, weight = crop_tables(
            tiling.scales, self.side, self.token_grid(tiling), self.block, self.merge[1], self.bilinear
        )
        first = np.arange(tiling.num_crops, dtype=np.int32)[:, None, None, None] * tiling.tiles_per_crop * self.side**2
        shifted = np.where(index < 0, -1, index + first)
        return shifted.reshape(-1, *index.shape[1:]), np.tile(weight, (tiling.num_crops, 1, 1))


def crop_canvas(width: int, height: int, square: int, most: int) -> tuple[int, int]:
    """The size at which an image is cut into at most ``most`` square crops.

    Its own size, or else the largest that ``most`` crops cover; a side shorter than a crop is stretched to it.
    """
    scale = max(min(1.0, i * square / width, (most // i) * square / height) for i in range(1, most + 1))
    return max(square, round(width * scale)), max(square, round(height * scale))


def crop_tiling(canvas: tuple[int, int], square: int, scales: tuple[Grid, ...]) -> Tiling:
    """As few square crops as cover a canvas, evenly spread."""
    width, height = canvas
    return Tiling(canvas, (square, square), (-(-height // square), -(-width // square)), scales)
