"""A plan: the contents of every row of a training run, fixed before it starts and kept as a file.

A plan is a pure function of (datasets, mixture, processor, row shape, B, seed), never the state of an iterator. The
plan and a step number determine every example of that step, on any number of hosts, so a run resumes from a plan hash
and a step.

    stage 0: order examples by their shares ──► windows of 16,384 ──► pack each ──► shuffle and balance rows ──► rows
    stage 1: …                                 (nothing is carried from one window into the next)

    DIR/plan.json           inputs, hash, realized shares
    DIR/row_offsets.npy     [rows + 1] i64: row j holds examples row_offsets[j] … row_offsets[j + 1] − 1
    DIR/examples.npy        [examples] u32: index of the record in its source
    DIR/sources.npy         [examples] u8: index of the source
    DIR/resized.npy         [k, 3] i64: source, record and most patches per image of each record that was too large
    DIR/rejected.npy        [k, 3] i64: source, record and reason (0 tokens, 1 patches) of each that fits no row
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from phivision_jax.batch import RowShape
from phivision_jax.config import check_types, typed
from phivision_jax.data.plan import packing, record_sizes
from phivision_jax.data.plan.example_order import Pool, RealizedShare, order_examples, realized_shares
from phivision_jax.data.plan.mixture import Mixture
from phivision_jax.data.shuffle import permutation
from phivision_jax.data.store.dataset import Dataset, check_processor
from phivision_jax.io import atomic
from phivision_jax.io.files import read_array
from phivision_jax.io.messages import prefix_errors
from phivision_jax.io.progress import bar
from phivision_jax.io.read_json import read_json
from phivision_jax.processor import Processor

FORMAT = 3
WINDOW = 16_384
"""Examples packed at a time: more fills rows better, but mixes the order less than a window's worth of shuffling."""
_ARRAYS = {"row_offsets": "<i8", "examples": "<u4", "sources": "u1", "resized": "<i8", "rejected": "<i8"}
_VALUES = {"inputs": Mapping[str, Any], "tokens_used": int, "patches_used": int}
MAX_SOURCES = 256
# Purposes of a seed are numbered over all modules of ``data.plan``.
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
    shares: tuple[RealizedShare, ...]
    tokens_used: int
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
        """Number of steps of ``batch_rows`` rows; empty rows fill up the last."""
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

    @property
    def text_padding(self) -> float:
        """Share of the positions of all rows that hold no token."""
        return padding(self.tokens_used, self.num_rows * self.row_shape.length)

    @property
    def patch_padding(self) -> float:
        """Share of the patches of all rows that are padding."""
        return padding(self.patches_used, self.num_rows * self.row_shape.total_patches)

    def summary(self) -> str:
        """The number of rows, their padding, left-out records and realized shares, as lines of text."""
        examples = len(self.examples)
        lines = [f"{self.num_rows:,} rows, {examples:,} examples ({examples / max(self.num_rows, 1):.2f} per row)"]
        lines.append(f"padding: text {self.text_padding:.2%}, patches {self.patch_padding:.2%}")
        names, reasons = self.inputs["names"], record_sizes.REASONS
        for (s, reason), count in sorted(collections.Counter(map(tuple, self.rejected[:, ::2].tolist())).items()):
            lines.append(f"do not fit a row: {count:,} records of {names[s]} ({reasons[reason]})")
        if len(self.resized):
            lines.append(f"resized to fewer patches: {len(self.resized):,} records")
        for stage, shares in itertools.groupby(self.shares, lambda share: share.stage):
            lines += [f"stage {stage!r}:", *(f"  {share}" for share in shares)]
        return "\n".join(lines)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the plan, completely or not at all; an existing plan is replaced."""
        check_out(directory)
        about = {"format": FORMAT, "hash": self.hash, **{name: getattr(self, name) for name in _VALUES}}
        about["shares"] = [dataclasses.asdict(share) for share in self.shares]
        with atomic.new_directory(Path(directory), replace=True) as partial:
            for name, dtype in _ARRAYS.items():
                np.save(partial / f"{name}.npy", np.asarray(getattr(self, name), dtype))
            (partial / "plan.json").write_text(json.dumps(about, indent=2) + "\n")

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Plan:
        """Open a saved plan; its arrays stay on disk (memory-mapped) until used.

        Raises:
          FileNotFoundError: when there is no plan.
          ValueError: for another format, or arrays that do not have the recorded hash.
        """
        directory = Path(directory)
        path = directory / "plan.json"
        if not path.is_file():
            raise FileNotFoundError(f"no plan at {directory} (plan.json is missing); make one first")
        about = read_json(path)
        if (format := about.get("format")) != FORMAT:
            raise ValueError(f"{path}: format {format!r:.100}, this program reads {FORMAT}; make the plan again")
        check_types(about, _VALUES, path)
        if not all(0 <= about[name] < 2**63 for name in ("tokens_used", "patches_used")):
            raise ValueError(f"{path}: tokens_used or patches_used is no count; make the plan again")
        arrays: dict[str, Any] = {}
        for name, dtype in _ARRAYS.items():
            columns = (3,) if name in ("resized", "rejected") else ()
            arrays[name] = read_array(directory / f"{name}.npy", dtype, None, *columns)
        with prefix_errors(str(path)):
            shares = typed(about.get("shares"), tuple[RealizedShare, ...], "shares")
        plan = cls(**arrays, shares=shares, **{name: about[name] for name in _VALUES})
        if plan.hash != about.get("hash"):
            raise ValueError(f"{directory}: the arrays do not have the hash in plan.json; make the plan again")
        return plan


def padding(used: int, total: int) -> float:
    """Share of the positions or patches of rows that hold nothing."""
    return 1 - used / total if total else 0.0


def check_out(directory: str | os.PathLike[str]) -> None:
    """Raise FileExistsError when the directory exists and is not a plan: only plans are ever replaced."""
    directory = Path(directory)
    if not directory.name or (directory.exists() and not (directory / "plan.json").is_file()):
        raise FileExistsError(f"{directory} exists and is not a plan; choose another name")


def plan_inputs(
    datasets: Sequence[Dataset],
    mixture: Mixture,
    processor: Processor,
    shape: RowShape,
    *,
    batch_rows: int = 1,
    seed: int = 0,
    on_overflow: record_sizes.Overflow = "drop",
    window: int = WINDOW,
) -> dict[str, Any]:
    """Everything that a plan is a function of, as JSON values: plans with equal inputs are equal.

    Args:
      datasets: of the mixture's sources, in their order.
      processor: with the tokenizer and template that the datasets were counted with; its patch settings are free.
      shape: of every row (``rows.row_shape`` of the processor's configuration).
      batch_rows: B, rows of a step, among which attention work is balanced.
      seed: of all orders.
      on_overflow: treatment of records that fit no row: "drop" counts and lists them, "resize" gives their images fewer
        patches where that helps, "error" stops.
      window: examples packed at a time.

    Raises:
      ValueError: when a dataset was counted with another tokenizer, or the arguments contradict each other.
    """
    if len(datasets) != len(mixture.sources):
        raise ValueError(f"{len(datasets)} datasets for a mixture of {len(mixture.sources)}")
    if len(datasets) > MAX_SOURCES:
        raise ValueError(f"a plan numbers its sources in one byte: {len(datasets)} are more than {MAX_SOURCES}")
    for dataset in datasets:
        check_processor(dataset, processor)
    for name, value, least in (("batch_rows", batch_rows, 1), ("seed", seed, 0), ("window", window, 1)):
        if value < least:
            raise ValueError(f"{name} must be {least} or more, not {value}")
    if (shape.merge or (0, 0, 0))[1:] != (processor.layout.merge or (0, 0)):
        raise ValueError(f"{shape} has no merge tables of {processor.layout.merge}, which the image layout makes")
    for stage in mixture.stages:
        stage.chosen(mixture.names)
    # Epochs of 1, 1.0 and the default give one plan.
    epochs = [{} if stage.examples else {"epochs": float(stage.epochs or 1)} for stage in mixture.stages]
    inputs = {
        "format": FORMAT,
        "sources": [dataset.hash for dataset in datasets],
        "names": list(mixture.names),
        "processor": processor.fingerprint,
        "image_layout": processor.layout.fingerprint,
        **dataclasses.asdict(shape),
        "batch_rows": batch_rows,
        "stages": [dataclasses.asdict(stage) | given for stage, given in zip(mixture.stages, epochs, strict=True)],
        "seed": seed,
        "on_overflow": on_overflow,
        "window": window,
        "held_out": {"share": mixture.held_out, "part": mixture.part},
    }
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
    """Order the examples of every stage by their shares and pack them into rows.

    Args:
      datasets, mixture, processor, shape, settings: as in ``plan_inputs``.
      progress: show a bar.

    Raises:
      ValueError: as ``plan_inputs`` and ``order_examples``; when no record fits a row; with on_overflow="error".
    """
    inputs = plan_inputs(datasets, mixture, processor, shape, **settings)
    seed = inputs["seed"]
    fitted = record_sizes.fit_records(datasets, processor.layout, shape, inputs["on_overflow"])
    lengths = fitted.lengths
    if not fitted.fits.any():
        shortest = lengths.tokens.argmin()
        given, total = ", ".join(str(dataset.directory) for dataset in datasets), sum(map(len, datasets))
        row = f"{shape.length} tokens and {shape.vision_rows} x {shape.num_patches} patches"
        needed = f"{lengths.tokens[shortest]} tokens and {lengths.patches[shortest]} patches"
        raise ValueError(f"{given}: none of {total} records fits a row of {row}; the smallest needs {needed}")
    eligible = np.concatenate([mixture.eligible(len(dataset), seed) for dataset in datasets])
    usable = np.flatnonzero(fitted.fits & eligible)
    modes, tasks = (array[usable].astype(np.int64) for array in (fitted.index.modes, fitted.index.tasks))
    owners = record_sizes.owners(fitted.first, usable)[0]
    pool = Pool(owners, lengths.tokens[usable], modes, tasks, fitted.index.task_names)
    chosen = [s for stage in mixture.stages for s in stage.chosen(mixture.names)]
    if mixture.held_out and not np.isin(pool.sources, chosen).any():
        problem = f"{mixture.held_out:g} of the records are held out, which leaves none for {mixture.part}"
        remedy = f"hold out a {'larger' if mixture.part == 'validation' else 'smaller'} share"
        raise ValueError(f"{problem}: there are {sum(map(len, datasets)):,}; {remedy}")

    windows: list[np.ndarray] = []
    shares: list[RealizedShare] = []
    for stage in mixture.stages:
        order, one_pass = order_examples(pool, mixture.names, stage, seed)
        shares += realized_shares(stage, mixture.names, pool, order)
        # Passes over a dataset so small that one does not fill two rows share rows.
        rows = int(pool.tokens[order[:one_pass]].sum()) / shape.length
        group = one_pass if rows >= 2 else one_pass * math.ceil(8 / rows)
        for passes in np.split(usable[order], range(group, len(order), group)):  # a window ends with them
            windows += np.split(passes, range(inputs["window"], len(passes), inputs["window"]))
    numbers, counts = _pack_windows(windows, lengths, shape, inputs, progress)
    sources, examples = record_sizes.owners(fitted.first, numbers)
    return Plan(
        inputs=inputs,
        row_offsets=np.concatenate([[0], np.cumsum(counts)]),
        examples=examples.astype(_ARRAYS["examples"]),
        sources=sources.astype(_ARRAYS["sources"]),
        resized=fitted.resized,
        rejected=fitted.rejected,
        shares=tuple(shares),
        tokens_used=int(lengths.tokens[numbers].sum()),
        patches_used=int(lengths.patches[numbers].sum()),
    )


def _pack_windows(
    windows: Sequence[np.ndarray], lengths: packing.Lengths, shape: RowShape, inputs: Mapping[str, Any], progress: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The examples of all windows [n], row after row, and the number of examples in each row [rows]."""
    examples: list[np.ndarray] = []
    counts: list[np.ndarray] = []
    num_rows = 0
    with bar("plan", sum(map(len, windows)), shown=progress) as advance:
        for number, window in enumerate(windows):
            packed, offsets = packing.pack(window, lengths, shape)
            shuffled = permutation(len(offsets) - 1, inputs["seed"], _ROW_ORDER, number)
            work, pending = packing.attention_work(packed, offsets, lengths), num_rows % inputs["batch_rows"]
            order = packing.balance(work, shuffled, inputs["batch_rows"], pending)
            rows = np.split(packed, offsets[1:-1])
            examples.append(np.concatenate([rows[j] for j in order]))
            counts.append(np.diff(offsets)[order])
            num_rows += len(order)
            advance(len(window))
    return np.concatenate(examples), np.concatenate(counts)
