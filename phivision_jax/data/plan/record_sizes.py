"""How large records are in a model's columns and patches, and what no row takes: arithmetic on the index alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from phivision_jax.batch import RowShape
from phivision_jax.data.plan.packing import Lengths, place
from phivision_jax.images import naflex

if TYPE_CHECKING:
    from phivision_jax.config import ModelConfig
    from phivision_jax.data.store.dataset import Dataset, Index

Overflow = Literal["drop", "resize", "error"]
REASONS = ("columns", "patches")
"""Why no row takes a record: it is longer than T, or its images do not fit R vision rows of P."""


def grids_of(index: Index, config: ModelConfig) -> np.ndarray:
    """[I, 2] i64: rows and columns of patches of every image, by arithmetic on its size."""
    return naflex.grids_of(index.image_sizes, config.vision.patch_size, config.min_patches, config.max_patches)


def lengths_of(index: Index, config: ModelConfig) -> Lengths:
    """Columns and patches of every record."""
    lengths = Lengths(index.text_tokens.astype(np.int64), grids_of(index, config).prod(axis=1), index.image_offsets)
    return dataclasses.replace(lengths, columns=lengths.columns + lengths.patches)


@dataclasses.dataclass(frozen=True)
class Measured:
    """One source against the rows."""

    lengths: Lengths
    fits: np.ndarray
    """[N] bool: an empty row takes it."""
    rejected: np.ndarray
    resized: np.ndarray
    """Both [k, 3], as in ``Plan``."""


def measure(source: int, dataset: Dataset, config: ModelConfig, capacity: RowShape, overflow: Overflow) -> Measured:
    """Hold a source's records against an empty row, and resize those that ``overflow`` says to.

    Args:
      source: its number, for ``rejected`` and ``resized``.

    Raises:
      ValueError: by overflow "error", naming the first record that does not fit.
    """
    lengths = lengths_of(dataset.index, config)
    has_images = dataset.index.num_images > 0
    too_long = lengths.columns > capacity.length
    too_many = lengths.patches > capacity.total_patches
    if capacity.vision_rows > 1:  # with one, the sum says it all
        empty = [0] * capacity.vision_rows
        for i in np.flatnonzero(~too_many & has_images).tolist():
            images = lengths.image_patches[lengths.offsets[i] : lengths.offsets[i + 1]].tolist()
            too_many[i] = place(empty, images, capacity.num_patches) is None
    fits = ~(too_long | too_many)
    resized = []
    if overflow == "resize":
        for i in np.flatnonzero(~fits & has_images).tolist():
            limit = _patch_limit(int(dataset.index.text_tokens[i]), dataset.index.sizes_of(i), config, capacity)
            if limit is not None:
                patches = [_patches(size, config, limit) for size in dataset.index.sizes_of(i)]
                lengths.image_patches[lengths.offsets[i] : lengths.offsets[i + 1]] = patches
                lengths.columns[i] = dataset.index.text_tokens[i] + sum(patches)
                fits[i] = True
                resized.append((source, i, limit))
    out = np.flatnonzero(~fits)
    if len(out) and overflow == "error":
        raise ValueError(
            f"{dataset.directory}: {len(out):,} records do not fit a row of {capacity.length} columns and "
            f"{capacity.vision_rows} x {capacity.num_patches} patches, the first is {dataset[int(out[0])].id!r} "
            f"({lengths.columns[out[0]]} columns, {lengths.patches[out[0]]} patches): "
            "take longer rows, or on_overflow drop or resize"
        )
    rejected = np.stack([np.full(len(out), source), out, np.where(too_long[out], 0, 1)], axis=1)
    return Measured(lengths, fits, rejected, np.array(resized, np.int64).reshape(-1, 3))


def _patches(size: tuple[int, int], config: ModelConfig, limit: int) -> int:
    rows, columns = naflex.grid_of(*size, config.vision.patch_size, min(config.min_patches, limit), limit)
    return rows * columns


def _patch_limit(text: int, sizes: Sequence[tuple[int, int]], config: ModelConfig, capacity: RowShape) -> int | None:
    """The most patches per image with which a record fits an empty row; None when even ``min_patches`` are too many."""

    def fits(limit: int) -> bool:
        patches = [_patches(size, config, limit) for size in sizes]
        placed = place([0] * capacity.vision_rows, patches, capacity.num_patches)
        return text + sum(patches) <= capacity.length and placed is not None

    low, high = config.min_patches, config.max_patches
    if not fits(low):
        return None
    while low < high:  # low fits; fewer patches never fit worse, but for the rounding of grids, so low is kept proven
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low
