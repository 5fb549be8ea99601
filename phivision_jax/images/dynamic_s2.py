"""Dynamic-S²: two fixed scales and a grid of tiles with the image's aspect ratio.

NVILA (Liu et al. 2024, arXiv 2412.04468, github.com/NVlabs/VILA): the image is stretched to one tile, to 2x2 tiles and
to a grid of tiles; the features of all are resized to the grid by areas and concatenated by channels, and squares of
2x2 are joined into a token (space-to-channel). Choices and departures:

    grid      the least distorted one whose sides the image's own resolution allows: at most ceil(side / 384) tiles. Of
              equally distorted grids the largest. NVILA asks for at least 9 tiles, whatever the resolution; the report
              states that tokens are limited by the resolution, so there is no such floor here
    cap       3,096 tokens: a tile of the grid has 144 (patch 16), so at most 21 tiles
    projector NVILA's begins with a layer norm and works tile by tile. Here it is the model's own, with
              ``projector.merge_size`` 12 (3 scales of 4 features); squares of features are formed after stitching,
              which matters for tiles of odd sides only (27x27 features, patch 14)
"""

from collections.abc import Iterator
from fractions import Fraction

from phivision_jax.images.layout import register_layout
from phivision_jax.images.pooling import Grid
from phivision_jax.images.tiles import TiledLayout, Tiling

_FIXED: tuple[Grid, ...] = ((1, 1), (2, 2))
_FIXED_TILES = 5


@register_layout("dynamic_s2")
class DynamicS2(TiledLayout):
    """Three scales, of which the last decides the tokens."""

    merge = (12, 4)
    report_cap = 3096
    block = 2

    def most_parts(self, max_patches: int) -> int:
        return min(4 * self.cap, max_patches - _FIXED_TILES * self.side**2) // self.side**2

    def divide(self, width: int, height: int, most: int) -> Tiling:
        aspect = Fraction(width, height)

        def badness(grid: Grid) -> tuple[Fraction, int, int]:
            rows, columns = grid
            stretch = aspect * Fraction(rows, columns)
            return max(stretch, 1 / stretch), -rows * columns, rows

        rows, columns = min(self._grids(width, height, most), key=badness)
        canvas = columns * self.tile_size, rows * self.tile_size
        return Tiling(canvas, canvas, (1, 1), (*_FIXED, (rows, columns)))

    def token_grid(self, tiling: Tiling) -> Grid:
        rows, columns = tiling.scales[-1]
        return rows * self.side, columns * self.side

    def _grids(self, width: int, height: int, most: int) -> Iterator[Grid]:
        """Rows and columns of tiles that enlarge no side by a tile or more, and whose tokens fit the cap."""
        yield 1, 1
        most_rows, most_columns = (-(-side // self.tile_size) for side in (height, width))
        for rows in range(1, min(most_rows, most) + 1):
            for columns in range(1, min(most_columns, most // rows) + 1):
                if -(-rows * self.side // 2) * -(-columns * self.side // 2) <= self.cap:
                    yield rows, columns
