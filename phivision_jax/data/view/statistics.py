"""The contents of datasets in numbers: sizes, lengths, modes, tasks, what was not imported, what exceeds a row.

Everything is computed from the index and the manifest, except the ids of a few records: a million records take seconds
and no image is decoded. ``statistics_report`` shows the numbers.
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from phivision_jax.batch import RowShape
from phivision_jax.config import ModelConfig
from phivision_jax.data.plan import packing, plan, record_sizes
from phivision_jax.data.plan.mixture import Mixture
from phivision_jax.data.records import MODES
from phivision_jax.data.shuffle import permutation
from phivision_jax.data.store.dataset import Dataset, Index
from phivision_jax.images.layout import make_layout

MAX_IMAGES = 8
"""Examples with this many images or more are counted together."""
LISTED = 5
"""Number of the largest records that exceed a row whose ids are given."""
_BINS = 60

type Numbers = dict[str, Any]
"""The numbers of one dataset, or of all together, as JSON values:

    name, examples, images, text_tokens, image_tokens, patches   name and totals
    images_per_example     examples with 0, 1, … images; the last counts those with ``MAX_IMAGES`` or more
    spreads                {measure: {min, median, mean, p95, max}}, null without values. Measures per example:
                           text_tokens, tokens, patches (of those with images); per image: image_patches, megapixels
    histograms             {measure: counts in the bins of ``edges["tokens"]``}
    resolutions            [width][height]: images in the bins of ``edges["side"]``
    examples_by, tokens_by {mode: {task: count}}
    system_messages        examples that came with one
    mode_from              {origin: examples}: the mode was stated, inferred from the answers, or set by default
    quarantined            {reason: records that were not imported}
    too_long               examples with more tokens than a row
    too_many_patches       of the others, those whose images do not fit the vision rows
    largest                the largest of both: {dataset, record, id, tokens, patches}
    rows, text_padding, patch_padding              of one epoch, estimated by packing a sample
"""


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Numbers of datasets, measured against rows of one shape."""

    groups: list[Numbers]
    """One per dataset, and a last one for all together when there are several."""
    shape: RowShape
    patch_size: int
    patch_range: tuple[int, int]
    """Images with fewer patches than the first are enlarged, those with more than the second are shrunk."""
    edges: dict[str, list[float]]
    """Bounds of the histograms' bins, evenly spaced in the logarithm: "tokens" (and patches) and "side" (pixels)."""


def compute(datasets: Sequence[Dataset], config: ModelConfig, shape: RowShape) -> Statistics:
    """Compute the statistics of datasets.

    Args:
      datasets: at least one; their text tokens are as counted at import.
      config: its patch settings and image layout decide how many patches an image becomes.
      shape: of the rows that the records are measured against.

    Raises:
      ValueError: without a dataset.
    """
    if not datasets:
        raise ValueError("statistics need at least one dataset")
    names = Mixture.from_directories(*(dataset.directory for dataset in datasets)).names
    layout, named = make_layout(config), dict(zip(names, datasets, strict=True))
    combined = record_sizes.fit_records(datasets, layout, shape, "drop")
    longest = max(shape.length, int(combined.lengths.tokens.max(initial=1)))
    side = max(1024, int(np.max(combined.index.image_sizes, initial=0)))
    ends = {"tokens": (1, longest * 1.5), "side": (16, side * 1.5)}
    edges = {name: np.geomspace(*pair, _BINS + 1).tolist() for name, pair in ends.items()}
    groups = []
    for name, dataset in named.items() if len(named) > 1 else ():
        alone = record_sizes.fit_records([dataset], layout, shape, "drop")
        groups.append(_numbers({name: dataset}, alone, shape, edges))
    groups.append(_numbers(named, combined, shape, edges))
    return Statistics(groups, shape, config.vision.patch_size, (config.min_patches, config.max_patches), edges)


def _numbers(
    named: Mapping[str, Dataset], fitted: record_sizes.FittedRecords, shape: RowShape, edges: dict[str, list[float]]
) -> Numbers:
    names, datasets = list(named), list(named.values())
    index, lengths = fitted.index, fitted.lengths
    text, num_images, sizes = index.text_tokens.astype(np.int64), index.num_images, index.image_sizes.astype(np.int64)
    measures = {
        "text_tokens": text,
        "tokens": lengths.tokens,
        "patches": lengths.patches[num_images > 0],
        "image_patches": lengths.image_patches,
    }
    exceeding = np.flatnonzero(~fitted.fits)
    too_long = int((lengths.tokens > shape.length).sum())
    largest = []
    for i in exceeding[np.argsort(-lengths.tokens[exceeding], kind="stable")[:LISTED]].tolist():
        source, record = map(int, record_sizes.owners(fitted.first, i))
        size = {"tokens": int(lengths.tokens[i]), "patches": int(lengths.patches[i])}
        largest.append({"dataset": names[source], "record": record, "id": datasets[source][record].id, **size})
    counts = [dataset.manifest["counts"] for dataset in datasets]
    widths, heights = np.maximum(sizes, edges["side"][0]).T
    return {
        "name": names[0] if len(names) == 1 else "all",
        "examples": len(text),
        "images": len(sizes),
        "text_tokens": int(text.sum()),
        "image_tokens": int(lengths.tokens.sum() - text.sum()),
        "patches": int(lengths.patches.sum()),
        "spreads": {name: _spread(v) for name, v in {**measures, "megapixels": sizes.prod(axis=1) / 1e6}.items()},
        "histograms": {name: np.histogram(v, edges["tokens"])[0].tolist() for name, v in measures.items()},
        "resolutions": np.histogram2d(widths, heights, (edges["side"],) * 2)[0].astype(int).tolist(),
        "images_per_example": np.bincount(np.minimum(num_images, MAX_IMAGES), minlength=MAX_IMAGES + 1).tolist(),
        "examples_by": _by_mode_and_task(index),
        "tokens_by": _by_mode_and_task(index, lengths.tokens),
        "system_messages": sum(c["system_messages"] for c in counts),
        "mode_from": _total([c["mode_from"] for c in counts]),
        "quarantined": _total([c["quarantined"] for c in counts]),
        "too_long": too_long,
        "too_many_patches": len(exceeding) - too_long,
        "largest": largest,
        **_epoch(np.flatnonzero(fitted.fits), lengths, shape),
    }


def _spread(values: np.ndarray) -> dict[str, float] | None:
    if not len(values):
        return None
    low, median, p95, high = np.percentile(values, (0, 50, 95, 100)).tolist()
    return {"min": low, "median": median, "mean": float(values.mean()), "p95": p95, "max": high}


def _by_mode_and_task(index: Index, amounts: np.ndarray | int = 1) -> dict[str, dict[str, int]]:
    totals = np.zeros((len(MODES), len(index.task_names)), np.int64)
    np.add.at(totals, (index.modes, index.tasks), amounts)
    rows = (dict(zip(index.task_names, row, strict=True)) for row in totals.tolist())
    return dict(zip(MODES, rows, strict=True))


def _total(counts: Sequence[dict[str, int]]) -> dict[str, int]:
    return dict(sum(map(collections.Counter, counts), collections.Counter()))


def _epoch(fits: np.ndarray, lengths: packing.Lengths, shape: RowShape) -> dict[str, float]:
    """Number of rows of an epoch and their padding, from packing at most one window of the examples that fit."""
    sample = fits[permutation(len(fits), 0)[: plan.WINDOW]]
    rows = len(packing.pack(sample, lengths, shape)[1]) - 1 if len(sample) else 0
    tokens, patches = (int(each[sample].sum()) for each in (lengths.tokens, lengths.patches))
    paddings = {"text_padding": plan.padding(tokens, rows * shape.length)}
    paddings["patch_padding"] = plan.padding(patches, rows * shape.total_patches)
    return {"rows": round(rows * len(fits) / max(len(sample), 1)), **paddings}
