"""Multi-crop: squares of the image at its own resolution, their tokens one crop after another.

The report cuts into potentially overlapping 384x384 squares and concatenates features on the token dimension, at most
3,096 tokens. It leaves open how; the rules here are:

    crops         as few as cover the image, evenly spread; no thumbnail. A side shorter than a crop is stretched to it
    compression   a crop of 24x24 features (patch 16) keeps them while all fit the cap: 5 crops have 2,880 tokens. More
                  crops are each interpolated bilinearly to v x v tokens, with the largest v that fits
    limit         v is at least half of 24, so that every feature has a weight: at most 21 crops. Larger images shrink
"""

import math
from collections.abc import Iterable

from phivision_jax.images.layout import register_layout
from phivision_jax.images.pooling import Grid
from phivision_jax.images.tiles import TiledLayout, Tiling, crop_canvas, crop_tiling


@register_layout("multicrop")
class MultiCrop(TiledLayout):
    """Crops of one tile each; a token is a feature, or a weighted sum of four."""

    merge = (1, 4)
    report_cap = 3096
    bilinear = True

    def most_parts(self, max_patches: int) -> int:
        return min(self.cap // self._least_side**2, max_patches // self.side**2)

    def divide(self, width: int, height: int, most: int) -> Tiling:
        return crop_tiling(crop_canvas(width, height, self.tile_size, most), self.tile_size, ((1, 1),))

    def tilings(self, most: int) -> Iterable[Tiling]:
        return (
            crop_tiling((n * self.tile_size, self.tile_size), self.tile_size, ((1, 1),)) for n in range(1, most + 1)
        )

    def token_grid(self, tiling: Tiling) -> Grid:
        v = min(self.side, max(self._least_side, math.isqrt(self.cap // tiling.num_crops)))
        return v, v

    @property
    def _least_side(self) -> int:
        return -(-self.side // 2)
