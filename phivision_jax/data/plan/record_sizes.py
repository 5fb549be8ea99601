"""Sizes of records in tokens and patches, from the index alone, and which of them fit a row."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

from phivision_jax.batch import RowShape
from phivision_jax.data.plan.packing import Lengths, place
from phivision_jax.data.store.dataset import Dataset, Index
from phivision_jax.images.layout import ImageLayout

Overflow = Literal["drop", "resize", "error"]
REASONS = ("tokens", "patches")
"""Why a record fits no row: it is longer than T, or its images do not fit R vision rows of P patches."""


def lengths_of(index: Index, layout: ImageLayout) -> Lengths:
    """Tokens and patches of every record."""
    patches, tokens = layout.measure_all(index.image_sizes)
    return Lengths(index.text_tokens + index.sum_images(tokens), patches, index.image_offsets)


def _overflow(lengths: Lengths, shape: RowShape) -> tuple[np.ndarray, np.ndarray]:
    """[N] bool each: examples of more tokens than a row has, and those whose images do not fit its vision rows."""
    patches = lengths.patches
    too_many = patches > shape.total_patches
    # Above one vision row's worth, it depends on the images' sizes.
    for i in np.flatnonzero(~too_many & (patches > shape.num_patches)).tolist():
        too_many[i] = place([0] * shape.vision_rows, lengths.images_of(i).tolist(), shape.num_patches) is None
    return lengths.tokens > shape.length, too_many


@dataclasses.dataclass(frozen=True)
class SourceFit:
    """The records of one source, compared with an empty row."""

    lengths: Lengths
    fits: np.ndarray
    """[N] bool."""
    rejected: np.ndarray
    """[k, 3], as in ``Plan``."""
    resized: np.ndarray
    """[k, 3], as in ``Plan``."""


def fit_source(source: int, dataset: Dataset, layout: ImageLayout, shape: RowShape, on_overflow: Overflow) -> SourceFit:
    """Compare a source's records with an empty row; with ``on_overflow`` "resize", shrink images where that helps.

    Args:
      source: the source's number, for ``rejected`` and ``resized``.

    Raises:
      ValueError: with ``on_overflow`` "error", naming the first record that does not fit.
    """
    lengths = lengths_of(dataset.index, layout)
    too_long, too_many = _overflow(lengths, shape)
    fits = ~(too_long | too_many)
    resized = []
    if on_overflow == "resize":
        for i in np.flatnonzero(~fits & (dataset.index.num_images > 0)).tolist():
            if found := _resize(int(dataset.index.text_tokens[i]), dataset.index.sizes_of(i), layout, shape):
                limit, tokens, patches = found
                lengths.tokens[i] = tokens
                lengths.images_of(i)[:] = patches
                fits[i] = True
                resized.append((source, i, limit))
    out = np.flatnonzero(~fits)
    if len(out) and on_overflow == "error":
        raise ValueError(
            f"{dataset.directory}: {len(out):,} records do not fit a row of {shape.length} tokens and "
            f"{shape.vision_rows} x {shape.num_patches} patches, the first is {dataset[int(out[0])].id!r} "
            f"({lengths.tokens[out[0]]} tokens, {lengths.patches[out[0]]} patches): "
            "take longer rows, or on_overflow drop or resize"
        )
    rejected = np.stack([np.full(len(out), source), out, np.where(too_long[out], 0, 1)], axis=1)
    return SourceFit(lengths, fits, rejected, np.array(resized, np.int64).reshape(-1, 3))


def _resize(
    text_tokens: int, sizes: list[tuple[int, int]], layout: ImageLayout, shape: RowShape
) -> tuple[int, int, list[int]] | None:
    """The highest limit of patches per image with which a record fits an empty row, by bisection.

    Returns:
      ``(limit, tokens, patches of each image)``; None when ``min_patches`` per image are too many.
    """

    def within(limit: int) -> tuple[int, int, list[int]] | None:
        images = [layout.measure(*size, limit) for size in sizes]
        tokens, patches = text_tokens + sum(image.tokens for image in images), [image.patches for image in images]
        fits = tokens <= shape.length and place([0] * shape.vision_rows, patches, shape.num_patches) is not None
        return (limit, tokens, patches) if fits else None

    low, high = layout.min_patches, layout.max_patches
    best = within(low)
    while best and low < high:  # the best so far has limit ``low``; a lower limit may round to a worse grid
        middle = (low + high + 1) // 2
        if found := within(middle):
            low, best = middle, found
        else:
            high = middle - 1
    return best
