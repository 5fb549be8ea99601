"""What is in which row, as a file: the order of a whole training, fixed before it starts.

A plan is a pure function of (dataset, processor, seed, T, R, P, epochs or number of examples), never the state of an
iterator. Whoever holds the plan and a step number knows every example of that step, on any number of hosts, so a
resume is a plan hash and a step.

    epoch 0: permutation of the records ──► windows of 16,384 ──► pack each ──► shuffle its rows ──► rows 0, 1, 2, …
    epoch 1: another permutation, …                 (nothing is carried from one window into the next)

    DIR/plan.json           inputs, hash, counts, rejected records
    DIR/row_offsets.npy     [rows + 1] i64: row j holds examples row_offsets[j] … row_offsets[j + 1] − 1
    DIR/examples.npy        [examples] u32: number of the record in its source
    DIR/sources.npy         [examples] u8: number of the source
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from phivision_jax.data.packing import Capacity, Lengths, pack, place
from phivision_jax.data.shuffle import permutation
from phivision_jax.images.naflex import grid_of

if TYPE_CHECKING:
    from phivision_jax.config import ModelConfig
    from phivision_jax.data.records import Dataset, Index
    from phivision_jax.processor import Processor

FORMAT = 1
WINDOW = 16_384
"""Examples packed at a time: more fills rows better, but mixes the order less than a window's worth of shuffling."""
_ARRAYS = {"row_offsets": "<i8", "examples": "<u4", "sources": "u1"}
# What a seed is used for.
_EPOCH_ORDER, _ROW_ORDER = 0, 1


@dataclasses.dataclass(frozen=True)
class Rejected:
    """A record that no row can take, and why."""

    source: int
    record: int
    id: str
    reason: str
    """"columns" (longer than T) or "patches" (its images do not fit R vision rows of P)."""


@dataclasses.dataclass(frozen=True)
class PlanSummary:
    rows: int
    examples: int
    text_padding: float
    """Share of the columns of all rows that hold nothing."""
    patch_padding: float
    rejected: Mapping[str, int]
    """Number of records by reason; which ones is in ``Plan.rejected``."""

    def __str__(self) -> str:
        lines = [
            f"{self.rows:,} rows, {self.examples:,} examples ({self.examples / max(self.rows, 1):.2f} per row)",
            f"padding: text {self.text_padding:.2%}, patches {self.patch_padding:.2%}",
        ]
        lines += [f"rejected for {reason}: {count:,} records" for reason, count in self.rejected.items()]
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    inputs: Mapping[str, Any]
    """Everything the plan is a function of, as JSON values."""
    row_offsets: np.ndarray
    examples: np.ndarray
    sources: np.ndarray
    rejected: tuple[Rejected, ...]
    columns_used: int
    patches_used: int

    @property
    def capacity(self) -> Capacity:
        return Capacity(self.inputs["length"], self.inputs["vision_rows"], self.inputs["num_patches"])

    @property
    def num_rows(self) -> int:
        return len(self.row_offsets) - 1

    def num_steps(self, batch_rows: int) -> int:
        """Steps of ``batch_rows`` rows; the last may be filled up with empty rows."""
        return -(-self.num_rows // batch_rows)

    def rows(self, step: int, batch_rows: int) -> list[np.ndarray]:
        """Rows ``step · batch_rows`` and following: per row [k, 2] i64, source and record of each example in order.

        Rows past the end of the plan are empty ([0, 2]).

        Raises:
          IndexError: when the plan has no such step.
        """
        if not 0 <= step < self.num_steps(batch_rows):
            raise IndexError(f"step {step} of a plan with {self.num_steps(batch_rows)} steps of {batch_rows} rows")
        first = step * batch_rows
        bounds = np.minimum(np.arange(first, first + batch_rows + 1), self.num_rows)
        offsets = np.asarray(self.row_offsets[bounds])
        span = slice(offsets[0], offsets[-1])
        pairs = np.stack([self.sources[span], self.examples[span]], axis=1).astype(np.int64)
        return np.split(pairs, offsets[1:-1] - offsets[0])

    @functools.cached_property
    def hash(self) -> str:
        """sha256 over the inputs and the arrays, the same on every machine."""
        digest = hashlib.sha256(json.dumps(self.inputs, sort_keys=True).encode())
        for name, dtype in _ARRAYS.items():
            digest.update(np.ascontiguousarray(getattr(self, name), dtype=dtype).data)
        return digest.hexdigest()

    def summary(self) -> PlanSummary:
        columns = self.num_rows * self.capacity.length
        patches = self.num_rows * self.capacity.vision_rows * self.capacity.num_patches
        return PlanSummary(
            rows=self.num_rows,
            examples=len(self.examples),
            text_padding=1 - self.columns_used / columns if columns else 0.0,
            patch_padding=1 - self.patches_used / patches if patches else 0.0,
            rejected=dict(collections.Counter(r.reason for r in self.rejected)),
        )

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the plan; it appears under its name only when whole, and replaces a plan that is there."""
        directory = Path(directory)
        partial = directory.with_name(f".{directory.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, dtype in _ARRAYS.items():
            np.save(partial / f"{name}.npy", np.asarray(getattr(self, name), dtype))
        about = {
            "format": FORMAT,
            "hash": self.hash,
            "inputs": self.inputs,
            "columns_used": self.columns_used,
            "patches_used": self.patches_used,
            "rejected": [dataclasses.asdict(r) for r in self.rejected],
        }
        (partial / "plan.json").write_text(json.dumps(about, indent=2) + "\n")
        if (directory / "plan.json").is_file():  # nothing but a plan is ever replaced
            shutil.rmtree(directory)
        partial.rename(directory)

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Plan:
        """Open a saved plan; its arrays stay on disk (memory-mapped) until used.

        Raises:
          FileNotFoundError: when it is not there.
          ValueError: for another format, or when arrays and hash do not belong together.
        """
        directory = Path(directory)
        path = directory / "plan.json"
        if not path.is_file():
            raise FileNotFoundError(f"no plan at {directory} (plan.json is missing); make one first")
        about = json.loads(path.read_text())
        if about["format"] != FORMAT:
            raise ValueError(f"{path}: format {about['format']}, this program reads {FORMAT}; make the plan again")
        try:
            arrays = {name: np.load(directory / f"{name}.npy", mmap_mode="r") for name in _ARRAYS}
        except (ValueError, EOFError) as error:
            raise ValueError(f"{directory}: an array is broken ({error}); make the plan again") from None
        plan = cls(
            inputs=about["inputs"],
            **arrays,
            rejected=tuple(Rejected(**r) for r in about["rejected"]),
            columns_used=about["columns_used"],
            patches_used=about["patches_used"],
        )
        if plan.hash != about["hash"]:
            raise ValueError(f"{directory}: the arrays do not have the hash in plan.json; make the plan again")
        return plan


def make_plan(
    dataset: Dataset,
    processor: Processor,
    *,
    length: int,
    vision_rows: int,
    num_patches: int,
    seed: int = 0,
    epochs: int | None = None,
    num_examples: int | None = None,
    window: int = WINDOW,
) -> Plan:
    """Plan a training: every epoch all records in a new order, packed into rows.

    Args:
      dataset: what to train on.
      processor: with the tokenizer and template that the dataset was counted with; its patch settings are free.
      length: T, text columns of a row.
      vision_rows: R.
      num_patches: P, patches of a vision row.
      seed: of the epochs' orders and of the rows' order within a window.
      epochs: how often each record is used; default 1. Give this or ``num_examples``.
      num_examples: how many examples in all, the last epoch cut short.
      window: examples packed at a time. Windows end with the epoch.

    Raises:
      ValueError: when the dataset was counted with another tokenizer, or no record fits a row.
    """
    if epochs is not None and num_examples is not None:
        raise ValueError("give epochs or num_examples, not both")
    capacity = Capacity(length, vision_rows, num_patches)
    lengths, fits, rejected = _measure(dataset, processor, capacity)
    total = num_examples if num_examples is not None else int(fits.sum()) * (1 if epochs is None else epochs)
    if total < 1:
        raise ValueError(f"a plan needs at least one example, not {total}")

    examples: list[np.ndarray] = []
    counts: list[np.ndarray] = []
    drawn, epoch = 0, 0
    while drawn < total:
        order = permutation(len(dataset), seed, _EPOCH_ORDER, epoch)
        order = order[fits[order]][: total - drawn]
        for first in range(0, len(order), window):
            packed, offsets = pack(order[first : first + window], lengths, capacity)
            shuffled = permutation(len(offsets) - 1, seed, _ROW_ORDER, len(examples))
            sizes = np.diff(offsets)[shuffled]
            # Row j of the window moves as a whole: its examples' places are its begin plus 0, 1, 2, …
            within = np.arange(len(packed)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
            examples.append(packed[np.repeat(offsets[:-1][shuffled], sizes) + within])
            counts.append(sizes)
        drawn, epoch = drawn + len(order), epoch + 1
    return _assemble(
        dataset,
        processor,
        capacity,
        {"order": "packed", "seed": seed, "num_examples": total, "window": window},
        lengths,
        np.concatenate(examples),
        np.concatenate(counts),
        rejected,
    )


def grids_of(index: Index, config: ModelConfig) -> np.ndarray:
    """[I, 2] i64: rows and columns of patches of every image, by arithmetic on its size."""
    if not len(index.image_sizes):
        return np.zeros((0, 2), np.int64)
    sizes, which = np.unique(index.image_sizes, axis=0, return_inverse=True)
    bounds = config.vision.patch_size, config.min_patches, config.max_patches
    return np.array([grid_of(int(w), int(h), *bounds) for w, h in sizes], np.int64)[which.reshape(-1)]


def lengths_of(index: Index, config: ModelConfig) -> Lengths:
    """Columns and patches of every record."""
    lengths = Lengths(index.text_tokens.astype(np.int64), grids_of(index, config).prod(axis=1), index.image_offsets)
    return dataclasses.replace(lengths, columns=lengths.columns + lengths.patches)


def check_processor(dataset: Dataset, processor: Processor) -> None:
    """Raise ValueError when the dataset's tokens were counted with another tokenizer or chat template."""
    ours = processor.text_fingerprint
    if dataset.manifest["text"] != ours:
        raise ValueError(
            f"{dataset.directory}: tokens were counted with another tokenizer or chat template "
            f"({dataset.manifest['text'][:12]}, this processor's are {ours[:12]}); import the records again with it"
        )


def _measure(dataset: Dataset, processor: Processor, capacity: Capacity) -> tuple[Lengths, np.ndarray, list[Rejected]]:
    """Lengths, which records [N] bool fit an empty row, and the others."""
    check_processor(dataset, processor)
    lengths = lengths_of(dataset.index, processor.config)
    too_long = lengths.columns > capacity.length
    too_many = lengths.patches > capacity.vision_rows * capacity.num_patches
    if capacity.vision_rows > 1:  # with one, the sum says it all
        empty = [0] * capacity.vision_rows
        for i in np.flatnonzero(~too_many & (dataset.index.num_images > 0)):
            images = lengths.image_patches[lengths.offsets[i] : lengths.offsets[i + 1]].tolist()
            too_many[i] = place(empty, images, capacity.num_patches) is None
    rejected = [
        Rejected(0, int(i), dataset[int(i)].id, "columns" if too_long[i] else "patches")
        for i in np.flatnonzero(too_long | too_many)
    ]
    fits = ~(too_long | too_many)
    if not fits.any():
        raise ValueError(
            f"{dataset.directory}: none of {len(dataset)} records fits a row of {capacity.length} columns and "
            f"{capacity.vision_rows} x {capacity.num_patches} patches; the smallest needs "
            f"{lengths.columns.min()} columns and {lengths.patches[lengths.columns.argmin()]} patches"
        )
    return lengths, fits, rejected


def _assemble(
    dataset: Dataset,
    processor: Processor,
    capacity: Capacity,
    how: Mapping[str, Any],
    lengths: Lengths,
    examples: np.ndarray,
    counts: np.ndarray,
    rejected: list[Rejected],
) -> Plan:
    return Plan(
        inputs={
            "format": FORMAT,
            "sources": [dataset.hash],
            "processor": processor.fingerprint,
            **dataclasses.asdict(capacity),
            **how,
        },
        row_offsets=np.concatenate([[0], np.cumsum(counts)]).astype(_ARRAYS["row_offsets"]),
        examples=examples.astype(_ARRAYS["examples"]),
        sources=np.zeros(len(examples), _ARRAYS["sources"]),
        rejected=tuple(rejected),
        columns_used=int(lengths.columns[examples].sum()),
        patches_used=int(lengths.patches[examples].sum()),
    )
