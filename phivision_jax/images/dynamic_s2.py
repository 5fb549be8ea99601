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

from collections.abc import Iterable, Iterator

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
        def badness(grid: Grid) -> tuple[float, int, int]:
            rows, columns = grid
            # Quotients of integers: equal ones are equal as floats.
            stretch, squeeze = rows * width / (columns * height), columns * height / (rows * width)
            return max(stretch, squeeze), -rows * columns, rows

        within = (-(-height // self.tile_size), -(-width // self.tile_size))
        return self._grid_tiling(min(self._grids(most, within), key=badness))

    def tilings(self, most: int) -> Iterable[Tiling]:
        return map(self._grid_tiling, self._grids(most, (most, most)))

    def token_grid(self, tiling: Tiling) -> Grid:
        rows, columns = tiling.scales[-1]
        return rows * self.side, columns * self.side

    def _grid_tiling(self, grid: Grid) -> Tiling:
        canvas = grid[1] * self.tile_size, grid[0] * self.tile_size
        return Tiling(canvas, canvas, (1, 1), (*_FIXED, grid))

    def _grids(self, most: int, within: Grid) -> Iterator[Grid]:
        """Rows and columns of at most ``most`` tiles whose tokens fit the cap, or one tile."""
        yield 1, 1
        for rows in range(1, min(within[0], most) + 1):
            for columns in range(1, min(within[1], most // rows) + 1):
                if -(-rows * self.side // 2) * -(-columns * self.side // 2) <= self.cap:
                    yield rows, columns
