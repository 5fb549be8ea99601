"""Random prompts for the checkpoint of ``tiny/``: text with none to three images. NumPy alone makes them.

Their greedy ids are compared up to the first step whose two largest logits are so close that rounding may decide.
"""

from __future__ import annotations

import dataclasses

import numpy as np

SEED = 12
PROMPTS, STEPS = 20, 32
MARGIN = 1e-3
"""Least difference of the two largest logits at which every implementation must choose the same token."""
IMAGE_TOKEN = -200
FIRST_SPECIAL_ID, MAX_PATCHES, PATCH_DIM = 251, 48, 768


@dataclasses.dataclass(frozen=True)
class Prompt:
    ids: list[int]
    """Token ids, −200 for each image."""
    patches: list[np.ndarray]
    """[n, 768] u8 of each image."""
    grids: list[tuple[int, int]]
    """Rows and columns of each image."""


def prompts() -> list[Prompt]:
    """``PROMPTS`` prompts of 1 to 40 text tokens, with images of up to 48 patches between them."""
    return [_prompt(np.random.default_rng([SEED, i]), num_images=i % 4) for i in range(PROMPTS)]


def _prompt(rng: np.random.Generator, num_images: int) -> Prompt:
    ids = rng.integers(0, FIRST_SPECIAL_ID, rng.integers(1, 41)).tolist()
    patches, grids = [], []
    for _ in range(num_images):
        ids.insert(int(rng.integers(0, len(ids) + 1)), IMAGE_TOKEN)
        rows = int(rng.integers(1, 9))
        # PyTorch resizes the position table wrongly for grids one patch wide (docs/architecture.md).
        columns = int(rng.integers(max(2, -(-4 // rows)), MAX_PATCHES // rows + 1))
        # Each patch has its own level and contrast, so that patches differ like those of photographs.
        n = rows * columns
        level, contrast = rng.uniform(60, 195, (n, 1)), rng.uniform(5, 120, (n, 1))
        pixels = level + contrast * rng.standard_normal((n, PATCH_DIM))
        patches.append(pixels.clip(0, 255).round().astype(np.uint8))
        grids.append((rows, columns))
    return Prompt(ids, patches, grids)


def decided(margins: np.ndarray) -> int:
    """Number of leading steps of a prompt whose margin [steps] is large enough to compare ids."""
    close = np.flatnonzero(margins <= MARGIN)
    return int(close[0]) if len(close) else len(margins)
