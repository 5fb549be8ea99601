"""What datasets hold, in numbers: sizes, lengths, modes, tasks, what was left out and what will not fit a row.

Everything comes from the index and the manifest, but for the names of a few records: a million records take seconds and
no image is decoded. ``stats_tables`` and ``stats_page`` show them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from phivision_jax.batch import RowShape
from phivision_jax.data.plan.mixture import Mixture
from phivision_jax.data.plan.packing import Lengths, pack, place
from phivision_jax.data.plan.plan import WINDOW
from phivision_jax.data.plan.record_sizes import lengths_of
from phivision_jax.data.records import MODES, TASKS
from phivision_jax.data.shuffle import permutation

if TYPE_CHECKING:
    from phivision_jax.config import ModelConfig
    from phivision_jax.data.store.dataset import Dataset

MOST_IMAGES = 8
"""Examples with this many images or more are counted together."""
NAMED = 5
"""How many of the largest records that do not fit are named."""
_BINS = 60


@dataclasses.dataclass(frozen=True)
class Spread:
    """Some numbers, in five."""

    least: float
    median: float
    mean: float
    p95: float
    """95 % are at most this."""
    most: float

    @classmethod
    def of(cls, values: np.ndarray) -> Spread | None:
        """None of no values."""
        if not len(values):
            return None
        median, p95 = np.percentile(values, (50, 95))
        return cls(float(values.min()), float(median), float(values.mean()), float(p95), float(values.max()))


@dataclasses.dataclass(frozen=True)
class TooLarge:
    """A record that no row takes."""

    dataset: str
    record: int
    id: str
    columns: int
    patches: int


@dataclasses.dataclass(frozen=True)
class Part:
    """One dataset, or all together."""

    name: str
    examples: int
    images: int
    text_tokens: int
    patches: int
    text: Spread | None
    """Text tokens per example, images not counted."""
    columns: Spread | None
    """Text tokens and patches per example: the columns of a row that it fills."""
    patches_per_example: Spread | None
    """Of the examples that have images."""
    patches_per_image: Spread | None
    megapixels: Spread | None
    images_per_example: tuple[int, ...]
    """Examples with 0, 1, … images; the last counts those with ``MOST_IMAGES`` or more."""
    examples_by: tuple[tuple[int, ...], ...]
    """[mode][task], in the order of ``MODES`` and ``TASKS``."""
    columns_by: tuple[tuple[int, ...], ...]
    system_messages: int
    """Examples that came with one."""
    mode_from: Mapping[str, int]
    """Examples whose mode was stated, inferred from the answers, or set by default."""
    quarantined: Mapping[str, int]
    """Not imported, by reason."""
    too_long: int
    """Examples of more columns than a row has."""
    too_many_patches: int
    """Of the others, those whose images do not fit the vision rows."""
    largest: tuple[TooLarge, ...]
    """The largest of both."""
    rows: int
    """About how many rows an epoch fills, from packing a sample."""
    text_padding: float
    patch_padding: float
    histograms: Mapping[str, tuple[int, ...]]
    """"text", "columns", "patches" (of examples), "image_patches": counts in the bins of ``Stats.edges``."""
    resolutions: tuple[tuple[int, ...], ...]
    """[width][height]: images in the bins of ``Stats.edges["side"]``."""


@dataclasses.dataclass(frozen=True)
class Stats:
    """One part per dataset, and a last one of all when there are several."""

    parts: tuple[Part, ...]
    capacity: RowShape
    patch_size: int
    patch_range: tuple[int, int]
    """Patches towards which small images are enlarged and large ones shrunk."""
    edges: Mapping[str, tuple[float, ...]]
    """Bounds of the bins, evenly over the logarithm: "columns" (tokens and patches) and "side" (pixels)."""

    @property
    def all(self) -> Part:
        return self.parts[-1]

    def to_json(self) -> dict[str, Any]:
        return {"modes": MODES, "tasks": TASKS, **dataclasses.asdict(self)}

    def __str__(self) -> str:
        from phivision_jax.data.view.statistics_tables import as_text

        return as_text(self)


def compute(datasets: Sequence[Dataset], config: ModelConfig, shape: RowShape) -> Stats:
    """Count.

    Args:
      datasets: at least one; text tokens are counted as their import counted them.
      config: its patch settings decide how many patches an image becomes.
      shape: of a row.

    Raises:
      ValueError: without a dataset, or when a row has no columns.
    """
    if not datasets:
        raise ValueError("statistics need at least one dataset")
    names = Mixture.of(*(dataset.directory for dataset in datasets)).names
    lengths = [lengths_of(dataset.index, config) for dataset in datasets]
    most = max(shape.length, *(int(part.columns.max(initial=1)) for part in lengths))
    sides = max(max(int(np.max(dataset.index.image_sizes, initial=0)) for dataset in datasets), 1024)
    edges = {
        "columns": tuple(np.geomspace(1, most * 1.5, _BINS + 1).tolist()),
        "side": tuple(np.geomspace(16, sides * 1.5, _BINS + 1).tolist()),
    }
    parts = [
        _part((name,), [dataset], [part], shape, edges)
        for name, dataset, part in zip(names, datasets, lengths, strict=True)
    ]
    if len(parts) > 1:
        parts.append(_part(names, datasets, lengths, shape, edges))
    return Stats(tuple(parts), shape, config.vision.patch_size, (config.min_patches, config.max_patches), edges)


def _part(
    names: Sequence[str],
    datasets: Sequence[Dataset],
    parts: Sequence[Lengths],
    capacity: RowShape,
    edges: Mapping[str, Sequence[float]],
) -> Part:
    lengths = _joined(parts)
    index = [dataset.index for dataset in datasets]
    text, num_images = (np.concatenate([getattr(i, name) for i in index]) for name in ("text_tokens", "num_images"))
    modes, tasks = (np.concatenate([getattr(i, name) for i in index]).astype(np.int64) for name in ("modes", "tasks"))
    sizes = np.concatenate([i.image_sizes for i in index]).astype(np.int64)
    patches, columns = lengths.patches, lengths.columns
    too_long, too_many = _overflow(lengths, capacity)
    fits = np.flatnonzero(~(too_long | too_many))
    rows, text_padding, patch_padding = _estimate(fits, lengths, capacity)
    group, cells = modes * len(TASKS) + tasks, len(MODES) * len(TASKS)
    counts: dict[str, Any] = {"system_messages": 0, "mode_from": {}, "quarantined": {}}
    for dataset in datasets:
        held = dataset.manifest["counts"]
        counts["system_messages"] += held["system_messages"]
        for field in ("mode_from", "quarantined"):
            for name, number in held[field].items():
                counts[field][name] = counts[field].get(name, 0) + number

    def by_cell(values: np.ndarray | None) -> tuple[tuple[int, ...], ...]:
        # Weights of bincount are floats: exact below 2⁵³.
        total = np.bincount(group, weights=values, minlength=cells).reshape(len(MODES), len(TASKS))
        return tuple(tuple(int(v) for v in row) for row in total)

    def histogram(values: np.ndarray) -> tuple[int, ...]:
        return tuple(np.histogram(values, edges["columns"])[0].tolist())

    sides = np.clip(sizes, edges["side"][0], None)
    resolutions = np.histogram2d(sides[:, 0], sides[:, 1], bins=(edges["side"], edges["side"]))[0]
    return Part(
        name=names[0] if len(names) == 1 else "all",
        examples=len(columns),
        images=len(sizes),
        text_tokens=int(text.sum(dtype=np.int64)),
        patches=int(patches.sum()),
        text=Spread.of(text),
        columns=Spread.of(columns),
        patches_per_example=Spread.of(patches[patches > 0]),
        patches_per_image=Spread.of(lengths.image_patches),
        megapixels=Spread.of(sizes.prod(axis=1) / 1e6),
        images_per_example=tuple(np.bincount(np.minimum(num_images, MOST_IMAGES), minlength=MOST_IMAGES + 1).tolist()),
        examples_by=by_cell(None),
        columns_by=by_cell(columns),
        too_long=int(too_long.sum()),
        too_many_patches=int((too_many & ~too_long).sum()),
        largest=_largest(names, datasets, lengths, too_long | too_many),
        rows=rows,
        text_padding=text_padding,
        patch_padding=patch_padding,
        histograms={
            "text": histogram(text),
            "columns": histogram(columns),
            "patches": histogram(patches[patches > 0]),
            "image_patches": histogram(lengths.image_patches),
        },
        resolutions=tuple(tuple(int(v) for v in row) for row in resolutions),
        **counts,
    )


def _joined(parts: Sequence[Lengths]) -> Lengths:
    starts = np.cumsum([0, *(len(part.image_patches) for part in parts)])[:-1]
    return Lengths(
        np.concatenate([part.columns for part in parts]),
        np.concatenate([part.image_patches for part in parts]),
        np.concatenate([[0], *(part.offsets[1:] + start for part, start in zip(parts, starts, strict=True))]),
    )


def _overflow(lengths: Lengths, capacity: RowShape) -> tuple[np.ndarray, np.ndarray]:
    """[N] bool each: more columns than a row has; images that the vision rows do not take."""
    patches = lengths.patches
    too_many = patches > capacity.total_patches
    if capacity.vision_rows > 1:
        # Between one vision row's worth and all of them, it depends on how the images lie.
        for i in np.flatnonzero(~too_many & (patches > capacity.num_patches)).tolist():
            images = lengths.image_patches[lengths.offsets[i] : lengths.offsets[i + 1]].tolist()
            too_many[i] = place([0] * capacity.vision_rows, images, capacity.num_patches) is None
    return lengths.columns > capacity.length, too_many


def _largest(
    names: Sequence[str], datasets: Sequence[Dataset], lengths: Lengths, left_out: np.ndarray
) -> tuple[TooLarge, ...]:
    which = np.flatnonzero(left_out)
    which = which[np.argsort(-lengths.columns[which], kind="stable")[:NAMED]]
    starts = np.cumsum([0, *(len(dataset) for dataset in datasets)])
    named = []
    for i in which.tolist():
        source = int(np.searchsorted(starts, i, side="right")) - 1
        record = i - int(starts[source])
        own = datasets[source][record].id
        named.append(TooLarge(names[source], record, own, int(lengths.columns[i]), int(lengths.patches[i])))
    return tuple(named)


def _estimate(fits: np.ndarray, lengths: Lengths, capacity: RowShape) -> tuple[int, float, float]:
    """Rows that an epoch fills, and the padding of columns and patches, from packing at most one window of examples."""
    if not len(fits):
        return 0, 0.0, 0.0
    sample = fits[permutation(len(fits), 0)[:WINDOW]]
    rows = len(pack(sample, lengths, capacity)[1]) - 1
    patches = rows * capacity.total_patches
    return (
        round(rows * len(fits) / len(sample)) or 1,
        1 - int(lengths.columns[sample].sum()) / (rows * capacity.length),
        1 - int(lengths.patches[sample].sum()) / patches if patches else 0.0,
    )
