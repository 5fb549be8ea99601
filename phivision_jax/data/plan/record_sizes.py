"""Sizes of records in tokens and patches, from the index alone, and which of them fit a row."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from phivision_jax.batch import RowShape
from phivision_jax.data.plan.packing import Lengths, place
from phivision_jax.data.records import join_tasks
from phivision_jax.data.store.dataset import Dataset, Index
from phivision_jax.images.layout import ImageLayout

Overflow = Literal["drop", "resize", "error"]
REASONS = ("tokens", "patches")
"""Why a record fits no row: it is longer than T, or its images do not fit R vision rows of P patches."""


def lengths_of(index: Index, layout: ImageLayout) -> Lengths:
    """Tokens and patches of every record."""
    patches, tokens = layout.measure_all(index.image_sizes)
    return Lengths(index.text_tokens + index.sum_images(tokens), patches, index.image_offsets)


def _join(indexes: Sequence[Index]) -> Index:
    """The index of several datasets, one after the other."""
    fields, names = ("text_tokens", "image_sizes", "modes"), join_tasks(index.task_names for index in indexes)
    arrays = {field: np.concatenate([getattr(index, field) for index in indexes]) for field in fields}
    tasks = [np.array([names.index(task) for task in index.task_names])[index.tasks] for index in indexes]
    offsets = np.cumsum(np.concatenate([[0], *(index.num_images for index in indexes)]), dtype=np.int64)
    return Index(**arrays, image_offsets=offsets, tasks=np.concatenate(tasks), task_names=names)


@dataclasses.dataclass(frozen=True)
class FittedRecords:
    """The records of several datasets, numbered one dataset after the other, compared with an empty row."""

    first: np.ndarray
    """[datasets + 1] i64: number of each dataset's first record, and of all records."""
    index: Index
    lengths: Lengths
    """Sizes after resizing."""
    fits: np.ndarray
    """[N] bool."""
    resized: np.ndarray
    """[k, 3], as in ``Plan``."""
    rejected: np.ndarray
    """[k, 3], as in ``Plan``."""


def owners(first: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The datasets of records by their numbers, and their indices in these; ``first`` as in ``FittedRecords``."""
    sources = np.searchsorted(first, numbers, side="right") - 1
    return sources, numbers - first[sources]


def fit_records(
    datasets: Sequence[Dataset], layout: ImageLayout, shape: RowShape, on_overflow: Overflow
) -> FittedRecords:
    """Compare records with an empty row; with ``on_overflow`` "resize", shrink images where that helps.

    Raises:
      ValueError: with ``on_overflow`` "error", naming the first record that does not fit; for a damaged index.
    """
    first = np.cumsum([0, *map(len, datasets)])
    index = _join([dataset.index for dataset in datasets])
    lengths = lengths_of(index, layout)
    too_long, patches = lengths.tokens > shape.length, lengths.patches
    fits = ~too_long & (patches <= shape.total_patches)
    # Above one vision row's worth, it depends on the images' sizes.
    for i in np.flatnonzero(fits & (patches > shape.num_patches)).tolist():
        fits[i] = place([0] * shape.vision_rows, lengths.images_of(i).tolist(), shape.num_patches) is not None
    limits = np.zeros(len(index), np.int64)
    for i in np.flatnonzero(~fits & (index.num_images > 0)).tolist() if on_overflow == "resize" else ():
        if found := _resize(int(index.text_tokens[i]), index.sizes_of(i), layout, shape):
            limits[i], lengths.tokens[i], lengths.images_of(i)[:] = found
            fits[i] = True
    out, resized = np.flatnonzero(~fits), np.flatnonzero(limits)
    sources, records = owners(first, out)
    if len(out) and on_overflow == "error":
        dataset, count = datasets[sources[0]], (sources == sources[0]).sum()
        row = f"{shape.length} tokens and {shape.vision_rows} x {shape.num_patches} patches"
        first_out = f"{dataset[int(records[0])].id!r:.100} ({lengths.tokens[out[0]]} tokens, {patches[out[0]]} patches)"
        problem = f"{count:,} records do not fit a row of {row}, the first is {first_out}"
        raise ValueError(f"{dataset.directory}: {problem}: take longer rows, or on_overflow drop or resize")
    rejected = np.stack([sources, records, ~too_long[out]], axis=1)
    shrunk = np.stack([*owners(first, resized), limits[resized]], axis=1)
    return FittedRecords(first, index, lengths, fits, shrunk, rejected)


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
