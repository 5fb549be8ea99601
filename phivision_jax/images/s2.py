"""S² (scaling on scales): one square of the image at three scales.

Shi et al. 2024 (arXiv 2403.13043, github.com/bfshi/scaling_on_scales): the image is resized to 384, 768 and 1,152
pixels, larger scales are cut into 384x384 tiles, features are stitched, averaged over areas to the grid of the first
scale, and concatenated by channels: as many tokens as one tile has, three times as wide. The published code expects
square images; here others are stretched, as the fixed scales of Dynamic-S² are.
"""

from collections.abc import Iterable
from typing import ClassVar

from phivision_jax.images.layout import register_layout
from phivision_jax.images.pooling import Grid
from phivision_jax.images.tiles import TiledLayout, Tiling, crop_canvas, crop_tiling


class SquaresS2(TiledLayout):
    """S² of each of several square crops of the image, whose side is the largest of the scales."""

    sides: ClassVar[tuple[int, ...]]
    """Side of each scale in tiles."""
    most_crops: ClassVar[int | None] = None

    def most_parts(self, max_patches: int) -> int:
        tiles = sum(side**2 for side in self.sides)
        most = min(self.cap, max_patches // tiles) // self.side**2
        return min(most, self.most_crops or most)

    def divide(self, width: int, height: int, most: int) -> Tiling:
        return self._crops(crop_canvas(width, height, self._square, most))

    def tilings(self, most: int) -> Iterable[Tiling]:
        return (self._crops((n * self._square, self._square)) for n in range(1, most + 1))

    def token_grid(self, tiling: Tiling) -> Grid:
        return self.side, self.side

    @property
    def _square(self) -> int:
        return self.sides[-1] * self.tile_size

    def _crops(self, canvas: tuple[int, int]) -> Tiling:
        return crop_tiling(canvas, self._square, tuple((side, side) for side in self.sides))


@register_layout("s2")
class S2(SquaresS2):
    """The complete image as one square."""

    merge = (3, 9)
    report_cap = 3096
    sides = (1, 2, 3)
    most_crops = 1
