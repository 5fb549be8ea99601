"""Merge tables that stitch the features of tiles, resize them to one grid, and put scales side by side.

Resizing is separable, so a table entry is a product of a weight along rows and one along columns:

    area      mean of the features from floor(o·n/m) to ceil((o+1)·n/m), as PyTorch's ``interpolate(mode="area")``
    bilinear  the two nearest, by distance, as ``interpolate(mode="bilinear")`` without antialiasing
"""

import functools

import numpy as np
from einops import rearrange

type Grid = tuple[int, int]
"""Rows and columns."""
type Tables = tuple[np.ndarray, np.ndarray]
"""``merge_index`` [tokens, n, k] i32 and ``merge_weight`` [tokens, n, k] f32."""


@functools.lru_cache(maxsize=256)
def crop_tables(scales: tuple[Grid, ...], side: int, to: Grid, block: int, k: int, bilinear: bool) -> Tables:
    """Merge tables of one crop.

    Args:
      scales: rows and columns of tiles of each scale; features are numbered scale by scale, tile by tile, row by row.
      side: features along a side of a tile.
      to: rows and columns to which the stitched features of each scale are resized.
      block: squares of this side are joined into a token (space-to-channel), row by row, the scales of each place side
        by side; features beyond the edge are zero.
      k: features in a weighted sum.
      bilinear: interpolate instead of averaging areas.
    """
    resize, first, indices, weights = _bilinear if bilinear else _area, 0, [], []
    for rows, columns in scales:
        count = rows * columns * side**2
        numbers = rearrange(
            np.arange(first, first + count), "(r c h w) -> (r h) (c w)", r=rows, c=columns, h=side, w=side
        )
        (y, y_weight), (x, x_weight) = resize(rows * side, to[0]), resize(columns * side, to[1])
        index = rearrange(numbers[y[:, None, :, None], x[None, :, None, :]], "r c i j -> r c (i j)")
        weight = rearrange(y_weight[:, None, :, None] * x_weight[None, :, None, :], "r c i j -> r c (i j)")
        beyond = [(0, 0), (0, 0), (0, k - index.shape[-1])]
        indices.append(np.pad(np.where(weight > 0, index, -1), beyond, constant_values=-1))
        weights.append(np.pad(weight, beyond))
        first += count
    even = [(0, -to[0] % block), (0, -to[1] % block), (0, 0), (0, 0)]
    blocks = "(r p) (c q) n k -> (r c) (p q n) k"
    index = rearrange(
        np.pad(np.stack(indices, axis=2), even, constant_values=-1).astype(np.int32), blocks, p=block, q=block
    )
    weight = rearrange(np.pad(np.stack(weights, axis=2), even).astype(np.float32), blocks, p=block, q=block)
    return index, weight


def _area(size: int, to: int) -> tuple[np.ndarray, np.ndarray]:
    """[to, window] indices into an axis of ``size``, and their weights."""
    start = np.arange(to) * size // to
    stop = -(-np.arange(1, to + 1) * size // to)
    inside = start[:, None] + np.arange((stop - start).max())
    weight = (inside < stop[:, None]) / (stop - start)[:, None]
    return np.minimum(inside, size - 1), weight


def _bilinear(size: int, to: int) -> tuple[np.ndarray, np.ndarray]:
    """[to, 2] indices into an axis of ``size``, and their weights."""
    centre = np.clip((np.arange(to) + 0.5) * size / to - 0.5, 0, size - 1)
    below = np.minimum(centre.astype(int), max(size - 2, 0))
    return np.minimum(np.stack([below, below + 1], 1), size - 1), np.stack([1 - centre + below, centre - below], 1)
