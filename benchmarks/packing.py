"""Padding and speed of our packing and of Grain's packers, on the same examples in one run.

    python benchmarks/packing.py                                   # a table
    python benchmarks/packing.py --out docs/results/packing.json   # the committed numbers

The examples follow the mix of the design: 15 % text only, 75 % one image, 10 % two or three; images from thumbnails to
4,000 pixels, resized to 256…3,600 patches; on average about 1,820 patches and 740 text tokens. Only lengths are packed:
Grain gets arrays of those lengths (one byte per token), so its times do not include copying pixels. Turns alternate;
each figure is the median of its turns, on one thread.

The last line is the imbalance of attention. Rows of a step are on different devices, and all wait for the one with the
most attention work (Σ length²): its work over that of the mean row is the factor by which attention takes longer.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import grain
import numpy as np

from phivision_jax.batch import RowShape
from phivision_jax.data.plan.packing import Lengths, attention_work, balance, best_fit_decreasing, pack
from phivision_jax.data.plan.plan import WINDOW
from phivision_jax.data.shuffle import permutation
from phivision_jax.images.naflex import grids_of

TURNS = 3
BATCH_ROWS = 256


def sample_lengths(n: int, seed: int = 0) -> Lengths:
    """Lengths of ``n`` examples of the mix; some are longer than a row."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(3, n, p=[0.15, 0.75, 0.10])
    images = np.where(kind == 0, 0, np.where(kind == 1, 1, rng.integers(2, 4, n)))
    text = np.where(kind == 0, rng.lognormal(6.8, 0.9, n), rng.lognormal(6.0, 1.0, n)).astype(int).clip(16, 7000)
    width = rng.lognormal(6.6, 0.55, images.sum()).clip(100, 4000).astype(int)
    height = (width * rng.lognormal(-0.2, 0.35, len(width))).clip(64, 4000).astype(int)
    patches = grids_of(np.stack([width, height], axis=1)).prod(axis=1)
    offsets = np.concatenate([[0], np.cumsum(images)])
    lengths = Lengths(text.astype(np.int64), patches, offsets)
    return Lengths(lengths.tokens + lengths.patches, patches, offsets)


def ours(packer: Callable[..., tuple[np.ndarray, np.ndarray]]) -> Callable[..., list[list[int]]]:
    """Pack windows one by one, as a plan does."""

    def rows(examples: np.ndarray, lengths: Lengths, capacity: RowShape) -> list[list[int]]:
        packed_rows: list[list[int]] = []
        for first in range(0, len(examples), WINDOW):
            packed, offsets = packer(examples[first : first + WINDOW], lengths, capacity)
            packed_rows += [row.tolist() for row in np.split(packed, offsets[1:-1])]
        return packed_rows

    return rows


def grains(packer: Any, bins: int) -> Callable[..., list[list[int]]]:
    """Pack with Grain; a third feature holds the number of each example."""

    def rows(examples: np.ndarray, lengths: Lengths, capacity: RowShape) -> list[list[int]]:
        patches = lengths.patches

        def element(i: int) -> dict[str, np.ndarray]:
            return {
                "tokens": np.zeros(lengths.tokens[i], np.uint8),
                "patches": np.zeros(patches[i], np.uint8),
                "number": np.array([i]),
            }

        total = capacity.total_patches
        source = grain.MapDataset.source(examples).map(element).to_iter_dataset(grain.ReadOptions(num_threads=0))
        packed = packer(
            source,
            length_struct={"tokens": capacity.length, "patches": total, "number": 4096},
            num_packing_bins=bins,
            shuffle_bins=False,
        )
        return [row["number"][: row["number_segment_ids"].astype(bool).sum()].tolist() for row in packed]

    return rows


def padding(rows: Iterable[list[int]], lengths: Lengths, capacity: RowShape) -> dict[str, float]:
    rows = list(rows)
    tokens = sum(int(lengths.tokens[row].sum()) for row in rows)
    patches = sum(int(lengths.patches[row].sum()) for row in rows)
    total = capacity.total_patches
    return {
        "rows": len(rows),
        "text_padding": 1 - tokens / (len(rows) * capacity.length),
        "patch_padding": 1 - patches / (len(rows) * total),
    }


def waiting(examples: np.ndarray, lengths: Lengths, capacity: RowShape, *, balanced: bool) -> float:
    """Ratio of a step's largest attention work of a row to the mean, over the steps of one window."""
    packed, offsets = pack(examples[:WINDOW], lengths, capacity)
    work = attention_work(packed, offsets, lengths)
    order = permutation(len(work), 0)
    if balanced:
        order = balance(work, order, BATCH_ROWS, 0)
    steps = work[order][: len(work) // BATCH_ROWS * BATCH_ROWS].reshape(-1, BATCH_ROWS)
    return float(steps.max(axis=1).sum() / steps.mean(axis=1).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=2 * WINDOW, help="number of examples (default: two windows)")
    parser.add_argument("--length", type=int, default=8192, help="tokens of a row")
    parser.add_argument("--vision-rows", type=int, default=1, help="vision rows of a row")
    parser.add_argument("--num-patches", type=int, default=7168, help="patches of a vision row")
    parser.add_argument("--turns", type=int, default=TURNS, help="timed runs of each packer")
    parser.add_argument("--out", type=Path, help="write the numbers to this JSON file")
    args = parser.parse_args()
    capacity = RowShape(args.length, args.vision_rows, args.num_patches)
    lengths = sample_lengths(args.examples + args.examples // 8)
    fits = (lengths.tokens <= capacity.length) & (lengths.patches <= capacity.num_patches)
    examples = np.flatnonzero(fits)[: args.examples]
    text = lengths.tokens - lengths.patches
    print(
        f"{len(examples):,} examples, on average {lengths.patches[examples].mean():,.0f} patches and "
        f"{text[examples].mean():,.0f} text tokens; T {capacity.length}, R {capacity.vision_rows}, "
        f"P {capacity.num_patches}; {1 - fits.mean():.1%} of the mix do not fit and are left out"
    )
    packers = {
        "ours": ours(pack),
        "ours, best fit only": ours(best_fit_decreasing),
        "Grain FirstFit, 64 bins": grains(grain.experimental.FirstFitPackIterDataset, 64),
        "Grain BestFit, 64 bins": grains(grain.experimental.BestFitPackIterDataset, 64),
        "Grain BestFit, 512 bins": grains(grain.experimental.BestFitPackIterDataset, 512),
    }
    seconds: dict[str, list[float]] = {name: [] for name in packers}
    found: dict[str, dict[str, float]] = {}
    for _ in range(args.turns):
        for name, packer in packers.items():
            began = time.perf_counter()
            rows = packer(examples, lengths, capacity)
            seconds[name].append(time.perf_counter() - began)
            assert sorted(i for row in rows for i in row) == sorted(examples.tolist()), f"{name} lost examples"
            found[name] = padding(rows, lengths, capacity)
    print(f"{'':<26}{'rows':>8}{'text padding':>14}{'patch padding':>15}{'examples/s':>12}")
    for name, row in found.items():
        row["examples_per_s"] = len(examples) / statistics.median(seconds[name])
        print(
            f"{name:<26}{row['rows']:>8,}{row['text_padding']:>14.2%}{row['patch_padding']:>15.2%}"
            f"{row['examples_per_s']:>12,.0f}"
        )
    shuffled, balanced = (waiting(examples, lengths, capacity, balanced=b) for b in (False, True))
    print(
        f"attention work of the fullest of {BATCH_ROWS} rows of a step over the mean: {balanced:.3f} balanced, "
        f"{shuffled:.3f} shuffled"
    )
    if args.out:
        result = {
            "capacity": {"length": args.length, "vision_rows": args.vision_rows, "num_patches": args.num_patches},
            "examples": len(examples),
            "turns": args.turns,
            "cores": os.cpu_count(),
            "packers": found,
            "work_fullest_over_mean": {"batch_rows": BATCH_ROWS, "balanced": balanced, "shuffled": shuffled},
        }
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
