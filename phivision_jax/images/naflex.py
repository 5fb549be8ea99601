"""NaFlex: any image as at most ``max_patches`` patches, at its own aspect ratio.

Sizes and pixels are exactly those of the released processor (Hugging Face ``Siglip2ImageProcessor`` with a patch count
that follows the image's size between a minimum and a maximum, instead of always being the maximum):

    1280 x 720 image, patch 16      floor(1280/16) * floor(720/16) = 3600 patches, within 256...3600
    largest scale s with            ceil(1280 s / 16) * ceil(720 s / 16) <= 3600       bisection in float64
    resize to complete patches      PIL bilinear, even where the size does not change
    patches                         row by row over the grid, each flattened (row, column, channel)

``min_patches`` is a target too, not a floor: a narrow image can end below it (37 x 91 gives 25 x 10 = 250).
"""

import functools

import einops
import numpy as np
from PIL import Image

from phivision_jax.config import ModelConfig
from phivision_jax.images.decode import to_rgb
from phivision_jax.images.layout import ImageLayout, ImageSize, PatchedImage, register_layout

_SCALE_RANGE = 1e-6, 100.0
_HALVINGS = 24
"""Steps of the bisection until the range is narrower than 1e-5, where the released processor stops."""


@register_layout("naflex")
class NaFlex(ImageLayout):
    """One tile of the image's own aspect ratio, one token per patch."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        if config.max_image_tokens is not None:
            raise ValueError("image_layout 'naflex' has a token per patch: set max_patches, not max_image_tokens")

    def measure(self, width: int, height: int, max_patches: int | None = None) -> ImageSize:
        rows, columns = grid_of(width, height, self.patch_size, *self._range(max_patches))
        return ImageSize(((rows, columns),), rows * columns)

    def measure_all(self, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        patches = grids_of(sizes, self.patch_size, *self._range(None)).prod(axis=1)
        return patches, patches

    def encode(self, image: Image.Image, max_patches: int | None = None) -> PatchedImage:
        patches, grid = preprocess(image, self.patch_size, *self._range(max_patches))
        return PatchedImage(patches, (grid,))

    def _range(self, max_patches: int | None) -> tuple[int, int]:
        most = min(max_patches or self.max_patches, self.max_patches)
        return min(self.min_patches, most), most


@functools.lru_cache(maxsize=1 << 16)
def grid_of(
    width: int, height: int, patch_size: int = 16, min_patches: int = 256, max_patches: int = 3600
) -> tuple[int, int]:
    """Rows and columns of patches (h, w) of an image of ``width`` x ``height`` pixels.

    Raises:
      ValueError: for an image without pixels.
    """
    rows, columns = grids_of(np.array([(width, height)]), patch_size, min_patches, max_patches)[0].tolist()
    return rows, columns


def grids_of(sizes: np.ndarray, patch_size: int = 16, min_patches: int = 256, max_patches: int = 3600) -> np.ndarray:
    """``grid_of`` for many sizes at once.

    The bisection runs in float64 with the released processor's bounds and stopping rule: its result is not quite the
    best scale, and a port that solves for the best one disagrees at 3 sizes in 10,000.

    Args:
      sizes: [I, 2] integers, width and height in pixels.
      patch_size, min_patches, max_patches: as in ``grid_of``.

    Returns:
      [I, 2] i64: rows and columns.

    Raises:
      ValueError: for an image without pixels.
    """
    sizes = np.asarray(sizes, np.int64).reshape(-1, 2)
    if len(sizes) and sizes.min() < 1:
        width, height = sizes[sizes.min(axis=1) < 1][0]
        raise ValueError(f"an image of {width}x{height} pixels has no patches")
    target = np.clip((sizes // patch_size).prod(axis=1), min_patches, max_patches)
    sides = sizes[:, ::-1].astype(np.float64)

    def grids_at(scale: np.ndarray) -> np.ndarray:
        return np.maximum(1, np.ceil(sides * scale[:, None] / patch_size))

    low, high = (np.full(len(sizes), bound) for bound in _SCALE_RANGE)
    for _ in range(_HALVINGS):
        scale = (low + high) / 2
        fits = grids_at(scale).prod(axis=1) <= target
        low, high = np.where(fits, scale, low), np.where(fits, high, scale)
    return grids_at(low).astype(np.int64)


def preprocess(
    image: Image.Image, patch_size: int = 16, min_patches: int = 256, max_patches: int = 3600
) -> tuple[np.ndarray, tuple[int, int]]:
    """Resize an image and cut it into patches.

    Args:
      image: any Pillow image; modes other than RGB by ``to_rgb`` (the released processor raises on them).
      patch_size: side of a patch in pixels.
      min_patches: the number of patches that small images are enlarged towards.
      max_patches: the largest number of patches.

    Returns:
      Patches [n, patch²·3] u8, row-major over the grid, and the grid (rows, columns); n is their product.

    Raises:
      ValueError: for an image without pixels, or of a mode that has no stated conversion.
    """
    rows, columns = grid_of(*image.size, patch_size, min_patches, max_patches)
    size = (columns * patch_size, rows * patch_size)
    rgb = to_rgb(image)
    # Pillow's resize to the same size is a copy.
    pixels = np.asarray(rgb if rgb.size == size else rgb.resize(size, Image.Resampling.BILINEAR))
    patches = einops.rearrange(pixels, "(r h) (c w) rgb -> (r c) (h w rgb)", r=rows, c=columns)
    return np.ascontiguousarray(patches), (rows, columns)
