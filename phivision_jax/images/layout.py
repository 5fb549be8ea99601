"""How an image becomes patches for the vision encoder."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class PatchedImage:
    """One image as the encoder takes it."""

    patches: np.ndarray
    """[n, patch²·3] u8, row-major over the grid."""
    grid: tuple[int, int]
    """Rows and columns of patches; n is their product."""

    def __post_init__(self) -> None:
        if self.patches.ndim != 2 or len(self.patches) != self.grid[0] * self.grid[1]:
            raise ValueError(f"patches {self.patches.shape} do not fill a grid of {self.grid[0]}x{self.grid[1]}")
        if self.patches.dtype != np.uint8:
            raise ValueError(f"patches are {self.patches.dtype}; give raw pixels as uint8, the model normalizes them")
