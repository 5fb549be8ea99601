"""Image layouts for tests, in which tokens are not patches. Importing this module registers them."""

from __future__ import annotations

import numpy as np
from einops import rearrange
from PIL import Image

from phivision_jax.images.decode import to_rgb
from phivision_jax.images.layout import ImageLayout, ImageSize, PatchedImage, register_layout


def patches_of(image: Image.Image, rows: int, columns: int, patch_size: int) -> np.ndarray:
    """[rows · columns, patch²·3] u8: an image resized to a grid of patches."""
    pixels = to_rgb(image).resize((columns * patch_size, rows * patch_size), Image.Resampling.BILINEAR)
    patches = rearrange(np.asarray(pixels), "(r h) (c w) rgb -> (r c) (h w rgb)", r=rows, c=columns)
    return np.ascontiguousarray(patches)


@register_layout("thumbnail")
class Thumbnail(ImageLayout):
    """One tile of 4x4 patches for any image; its 4 tokens are means of 2x2 features."""

    merge = (1, 4)

    def measure(self, width: int, height: int, max_patches: int | None = None) -> ImageSize:
        return ImageSize(((4, 4),), 4)

    def encode(self, image: Image.Image, max_patches: int | None = None) -> PatchedImage:
        patches = patches_of(image, 4, 4, self.patch_size)
        index = rearrange(np.arange(16, dtype=np.int32), "(r h c w) -> (r c) 1 (h w)", r=2, h=2, c=2)
        return PatchedImage(patches, ((4, 4),), index, np.full(index.shape, 1 / 4, np.float32))

    def max_tokens(self, num_patches: int) -> int:
        return num_patches // 4


@register_layout("overview_and_detail")
class OverviewAndDetail(ImageLayout):
    """Two tiles: 1x2 patches of the complete image, and 2 rows of as many columns as its width has patches.

    A token per detail patch concatenates the detail with the mean of the overview (channels of S² look like this);
    the second feature of the detail's mean does not exist.
    """

    merge = (2, 2)

    def measure(self, width: int, height: int, max_patches: int | None = None) -> ImageSize:
        columns = max(1, width // self.patch_size)
        return ImageSize(((1, 2), (2, columns)), 2 * columns)

    def encode(self, image: Image.Image, max_patches: int | None = None) -> PatchedImage:
        size = self.measure(*image.size)
        patches = np.concatenate([patches_of(image, *grid, self.patch_size) for grid in size.grids])
        index = np.empty((size.tokens, 2, 2), np.int32)
        index[:, 0] = np.stack([2 + np.arange(size.tokens), np.full(size.tokens, -1)], axis=-1)
        index[:, 1] = 0, 1
        weight = np.broadcast_to(np.array([[1, 1], [0.5, 0.5]], np.float32), index.shape)
        return PatchedImage(patches, size.grids, index, weight)
