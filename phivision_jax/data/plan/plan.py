"""What is in which row, as a file: the order of a whole training, fixed before it starts.

A plan is a pure function of (datasets, mixture, processor, seed, T, R, P, B), never the state of an iterator. Whoever
holds the plan and a step number knows every example of that step, on any number of hosts, so a resume is a plan hash
and a step.

    stage 0: draw examples in their shares ──► windows of 16,384 ──► pack each ──► shuffle, balance its rows ──► rows
    stage 1: …                                 (nothing is carried from one window into the next)

    DIR/plan.json           inputs, hash, what was drawn
    DIR/row_offsets.npy     [rows + 1] i64: row j holds examples row_offsets[j] … row_offsets[j + 1] − 1
    DIR/examples.npy        [examples] u32: number of the record in its source
    DIR/sources.npy         [examples] u8: number of the source
    DIR/resized.npy         [k, 3] i64: source, record and most patches per image of each record that was too large
    DIR/rejected.npy        [k, 3] i64: source, record and reason (0 columns, 1 patches) of each that no row takes
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from phivision_jax.batch import RowShape
from phivision_jax.data.plan.example_order import Pool, draw
from phivision_jax.data.plan.mixture import Mixture
from phivision_jax.data.plan.packing import Lengths, attention_work, balance, pack
from phivision_jax.data.plan.realized_shares import Drawn, PlanSummary, account
from phivision_jax.data.plan.record_sizes import REASONS, Overflow, measure
from phivision_jax.data.shuffle import permutation
from phivision_jax.data.store.dataset import check_processor
from phivision_jax.io.progress import bar

if TYPE_CHECKING:
    from phivision_jax.data.store.dataset import Dataset
    from phivision_jax.processor import Processor

FORMAT = 2
WINDOW = 16_384
"""Examples packed at a time: more fills rows better, but mixes the order less than a window's worth of shuffling."""
_ARRAYS = {"row_offsets": "<i8", "examples": "<u4", "sources": "u1", "resized": "<i8", "rejected": "<i8"}
_MOST_SOURCES = 256
# What a seed is used for; ``mixture`` has a number of its own.
_ROW_ORDER = 1


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    inputs: Mapping[str, Any]
    """Everything the plan is a function of, as JSON values."""
    row_offsets: np.ndarray
    examples: np.ndarray
    sources: np.ndarray
    resized: np.ndarray
    rejected: np.ndarray
    drawn: tuple[Drawn, ...]
    columns_used: int
    patches_used: int

    @property
    def row_shape(self) -> RowShape:
        merge = self.inputs["merge"]
        sizes = {name: self.inputs[name] for name in ("length", "vision_rows", "num_patches")}
        return RowShape(**sizes, merge=tuple(merge) if merge else None)

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
    def patch_limits(self) -> Mapping[tuple[int, int], int]:
        """(source, record) → most patches per image, for the records that are resized to fit."""
        return {(s, i): limit for s, i, limit in self.resized.tolist()}

    @functools.cached_property
    def hash(self) -> str:
        """sha256 over the inputs and the arrays, the same on every machine."""
        digest = hashlib.sha256(json.dumps(self.inputs, sort_keys=True).encode())
        for name, dtype in _ARRAYS.items():
            digest.update(np.ascontiguousarray(getattr(self, name), dtype=dtype).data)
        return digest.hexdigest()

    def summary(self) -> PlanSummary:
        columns = self.num_rows * self.row_shape.length
        patches = self.num_rows * self.row_shape.vision_rows * self.row_shape.num_patches
        return PlanSummary(
            rows=self.num_rows,
            examples=len(self.examples),
            text_padding=1 - self.columns_used / columns if columns else 0.0,
            patch_padding=1 - self.patches_used / patches if patches else 0.0,
            rejected={
                f"{self.inputs['names'][s]} ({REASONS[reason]})": count
                for (s, reason), count in sorted(
                    collections.Counter((s, reason) for s, _, reason in self.rejected.tolist()).items()
                )
            },
            resized=len(self.resized),
            drawn=self.drawn,
        )

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the plan; it appears under its name only when whole, and replaces a plan that is there."""
        check_out(directory)
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
            "drawn": [dataclasses.asdict(d) for d in self.drawn],
        }
        (partial / "plan.json").write_text(json.dumps(about, indent=2) + "\n")
        shutil.rmtree(directory, ignore_errors=True)
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
            drawn=tuple(Drawn(**d) for d in about["drawn"]),
            columns_used=about["columns_used"],
            patches_used=about["patches_used"],
        )
        if plan.hash != about["hash"]:
            raise ValueError(f"{directory}: the arrays do not have the hash in plan.json; make the plan again")
        return plan


def check_out(directory: str | os.PathLike[str]) -> None:
    """Raise FileExistsError when something that is not a plan is there: only plans are ever replaced."""
    directory = Path(directory)
    if not directory.name:
        raise FileExistsError(f"{directory} is no name for a new directory; choose one for the plan")
    if directory.exists() and not (directory / "plan.json").is_file():
        raise FileExistsError(f"{directory} exists and is not a plan; choose another name")


def differing(inputs: Any, others: Any, path: str = "") -> str | None:
    """The first of the inputs that others have otherwise, as "stages.0.epochs is 2.0 there, 1.0 here"; None if none."""
    for key in {**inputs, **others} if isinstance(inputs, Mapping) else range(len(inputs)):
        mine, theirs = (side[key] if isinstance(side, list) else side.get(key) for side in (inputs, others))
        if mine == theirs:
            continue
        where = f"{path}{key}"
        alike = isinstance(mine, dict | list) and isinstance(theirs, type(mine)) and len(mine) == len(theirs)
        return (alike and differing(mine, theirs, f"{where}.")) or f"{where} is {theirs} there, {mine} here"
    return None


def plan_inputs(
    datasets: Sequence[Dataset],
    mixture: Mixture,
    processor: Processor,
    shape: RowShape,
    *,
    batch_rows: int = 1,
    seed: int = 0,
    on_overflow: Overflow = "drop",
    window: int = WINDOW,
) -> dict[str, Any]:
    """Everything that a plan is a function of, as JSON values: two plans with equal inputs are the same plan.

    Raises:
      ValueError: when a dataset was counted with another tokenizer, or datasets and mixture do not belong together.
    """
    if len(datasets) != len(mixture.sources):
        raise ValueError(f"{len(datasets)} datasets for a mixture of {len(mixture.sources)}")
    if len(datasets) > _MOST_SOURCES:
        raise ValueError(f"a plan numbers its sources in one byte: {len(datasets)} are more than {_MOST_SOURCES}")
    for dataset in datasets:
        check_processor(dataset, processor)
    for name, value, least in (("batch_rows", batch_rows, 1), ("seed", seed, 0), ("window", window, 1)):
        if value < least:
            raise ValueError(f"{name} must be {least} or more, not {value}")
    for stage in mixture.stages:
        stage.chosen(mixture.names)
    stages = [dataclasses.asdict(stage) for stage in mixture.stages]
    for stage_inputs in stages:
        if stage_inputs["examples"] is None:  # 1, 1.0 and nothing said are one plan
            stage_inputs["epochs"] = float(stage_inputs["epochs"] or 1)
        if not stage_inputs["replay"]:  # and the plan that it was before there was such a thing
            del stage_inputs["replay"]
    inputs = {
        "format": FORMAT,
        "sources": [dataset.hash for dataset in datasets],
        "names": list(mixture.names),
        "processor": processor.fingerprint,
        **dataclasses.asdict(shape),
        "batch_rows": batch_rows,
        "stages": stages,
        "seed": seed,
        "on_overflow": on_overflow,
        "window": window,
    }
    if mixture.held_out:
        inputs["held_out"] = {"share": mixture.held_out, "part": mixture.part}
    return json.loads(json.dumps(inputs))


def make_plan(
    datasets: Sequence[Dataset],
    mixture: Mixture,
    processor: Processor,
    shape: RowShape,
    *,
    progress: bool = False,
    **settings: Any,
) -> Plan:
    """Plan a training: draw every stage's examples in their shares and pack them into rows.

    Args:
      datasets: of the mixture's sources, in their order.
      mixture: what to draw.
      processor: with the tokenizer and template that the datasets were counted with; its patch settings are free.
      shape: of a row.
      progress: show a bar.
      settings: of ``plan_inputs``. batch_rows: B, rows of a step, between which attention work is balanced; seed: of
        all orders;
        on_overflow: what happens to records that no row takes: "drop" counts and names them, "resize" gives their
        images fewer patches where that helps, "error" stops; window: examples packed at a time.

    Raises:
      ValueError: as ``plan_inputs`` and ``mixture.draw``; when no record fits a row; by on_overflow="error".
    """
    inputs = plan_inputs(datasets, mixture, processor, shape, **settings)
    measured = [
        measure(s, dataset, processor.config, shape, inputs["on_overflow"]) for s, dataset in enumerate(datasets)
    ]
    if not any(m.fits.any() for m in measured):
        shortest = min((m.lengths.columns.min(), m.lengths.patches[m.lengths.columns.argmin()]) for m in measured)
        raise ValueError(
            f"{', '.join(str(d.directory) for d in datasets)}: none of {sum(map(len, datasets))} records fits a row of "
            f"{shape.length} columns and {shape.vision_rows} x {shape.num_patches} patches; the smallest "
            f"needs {shortest[0]} columns and {shortest[1]} patches"
        )
    lengths, first = join_lengths([m.lengths for m in measured])
    names = mixture.names
    pools = []
    for m, dataset in zip(measured, datasets, strict=True):
        which = np.flatnonzero(m.fits & mixture.draws(len(dataset), inputs["seed"]) if mixture.held_out else m.fits)
        index = dataset.index
        pools.append(Pool(which, m.lengths.columns[which], index.modes[which], index.tasks[which]))
    if mixture.held_out and not any(len(pools[s].records) for stage in mixture.stages for s in stage.chosen(names)):
        raise ValueError(
            f"{mixture.held_out:g} of the records are held out, which leaves none for {mixture.part}: there are "
            f"{sum(map(len, datasets)):,}; hold out a {'larger' if mixture.part == 'validation' else 'smaller'} share"
        )

    rows = _Rows(lengths, shape, inputs["seed"], inputs["batch_rows"])
    drawn: list[Drawn] = []
    for stage in mixture.stages:
        sources, records, one_pass = draw(pools, names, stage, inputs["seed"])
        numbers = first[sources] + records
        together = one_pass * _passes_together(lengths.columns[numbers[:one_pass]], shape)
        drawn += account(stage, names, sources, records, pools, datasets, lengths.columns[numbers])
        with bar(f"plan {stage.name}", len(numbers), shown=progress) as advance:
            for begin in range(0, len(numbers), together):  # windows end with the pass
                in_pass = numbers[begin : begin + together]
                for window in range(0, len(in_pass), inputs["window"]):
                    taken = in_pass[window : window + inputs["window"]]
                    rows.add(taken)
                    advance(len(taken))
    numbers = np.concatenate(rows.examples)
    sources = np.searchsorted(first, numbers, side="right") - 1
    return Plan(
        inputs=inputs,
        row_offsets=np.concatenate([[0], np.cumsum(np.concatenate(rows.counts))]).astype(_ARRAYS["row_offsets"]),
        examples=(numbers - first[sources]).astype(_ARRAYS["examples"]),
        sources=sources.astype(_ARRAYS["sources"]),
        resized=np.concatenate([m.resized for m in measured]).astype(_ARRAYS["resized"]),
        rejected=np.concatenate([m.rejected for m in measured]).astype(_ARRAYS["rejected"]),
        drawn=tuple(drawn),
        columns_used=int(lengths.columns[numbers].sum()),
        patches_used=int(lengths.patches[numbers].sum()),
    )


def _passes_together(columns: np.ndarray, shape: RowShape) -> int:
    """1; more for a set so small that a pass of it does not fill two rows: those of several passes then share rows."""
    rows = int(columns.sum()) / shape.length
    return 1 if rows >= 2 else math.ceil(8 / rows)


class _Rows:
    """The plan's rows as they come to be, window after window."""

    def __init__(self, lengths: Lengths, shape: RowShape, seed: int, batch_rows: int) -> None:
        self.lengths, self.row_shape, self.seed, self.batch_rows = lengths, shape, seed, batch_rows
        self.examples: list[np.ndarray] = []
        self.counts: list[np.ndarray] = []
        self.total = 0

    def add(self, window: np.ndarray) -> None:
        packed, offsets = pack(window, self.lengths, self.row_shape)
        shuffled = permutation(len(offsets) - 1, self.seed, _ROW_ORDER, len(self.examples))
        work = attention_work(packed, offsets, self.lengths)
        order = balance(work, shuffled, self.batch_rows, self.total % self.batch_rows)
        sizes = np.diff(offsets)[order]
        # Row j of the window moves as a whole: its examples' places are its begin plus 0, 1, 2, …
        within = np.arange(len(packed)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        self.examples.append(packed[np.repeat(offsets[:-1][order], sizes) + within])
        self.counts.append(sizes)
        self.total += len(sizes)


def join_lengths(parts: Sequence[Lengths]) -> tuple[Lengths, np.ndarray]:
    """The lengths of all sources as one, and the number of each source's first record in it."""
    first = np.concatenate([[0], np.cumsum([len(part.columns) for part in parts])])[:-1]
    images = np.concatenate([[0], np.cumsum([len(part.image_patches) for part in parts])])[:-1]
    joined = Lengths(
        np.concatenate([part.columns for part in parts]),
        np.concatenate([part.image_patches for part in parts]),
        np.concatenate([[0], *(part.offsets[1:] + at for part, at in zip(parts, images, strict=True))]),
    )
    return joined, first
