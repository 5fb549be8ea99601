"""Fit the modelled step time to half of MaxText's published runs and show the error on the other half.

    python benchmarks/roofline.py            # a table, docs/results/roofline.json and .png; seconds, no TPU

The runs, and the rule that says which are fitted, are in docs/results/roofline_rows.json; docs/roofline.md explains.
Then the released model itself at T = 8,192 on three slices, by what its layers compute again. All times are modelled.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from phivision_jax.config import ModelConfig
from phivision_jax.hardware.flops import Workload, mfu, step_flops
from phivision_jax.hardware.topology import CHIPS, parse_topology
from phivision_jax.preflight.model import roofline
from phivision_jax.preflight.model.roofline import (
    MATRIX_UNIT,
    RECOMPUTE,
    Pairs,
    Split,
    Stack,
    Work,
    step_time,
    visited_pairs,
)

RESULTS = Path(__file__).parents[1] / "docs" / "results"
GENERATIONS = ("v5e", "v5p", "v6e")
RATIOS = (0.5, 2 / 3, 1.0)
"""Values of ATTENTION_RATIO to try, so that a reader sees what hangs on it."""

# Examples of 3,000 columns with one image of 1,830 patches, rows filled to 99 %.
LENGTH, NUM_PATCHES, EXAMPLE, IMAGE, FILLED = 8192, 7168, 3000, 1830, 0.99
SLICES = {
    "v5p:4x4x8": Split(data=4, fsdp=32),
    "v5e:16x16": Split(data=8, fsdp=32),
    "v6e:16x16": Split(data=8, fsdp=32),
}
POLICIES = ("full", "attention", "dots", "none")


def work_of(row: dict[str, Any]) -> Work:
    """What a chip executes in a published run."""
    m, split = row["model"], Split(fsdp=row["fsdp"], tensor=row["tensor"])
    T, tokens = row["length"], row["rows_per_chip"] * row["length"]
    blocks = row["attention"]
    local = m["layers"] - m["layers"] // m["global_every"] if m["global_every"] else 0

    def pairs(block: Sequence[int]) -> float:
        everywhere = visited_pairs(T, [T], *block) * (m["layers"] - local)
        nearby = visited_pairs(T, [T], *block, window=m["window"]) * local if local else 0
        return row["rows_per_chip"] * (everywhere + nearby)

    stack = Stack(
        layers=m["layers"],
        width=m["width"],
        mlp=m["mlp"],
        heads=m["heads"],
        kv_heads=m["kv_heads"],
        head_dim=m["head_dim"],
        gated=m["gated"],
        tokens=tokens,
        # A chip of a tensor group has its share of the heads, for the rows of all of the group.
        pairs=Pairs(pairs(blocks["forward"]), pairs(blocks["backward"]), blocks["dq"] and pairs(blocks["dq"])),
        recompute=frozenset(row["recompute"]) | {"elementwise"},
        residual_split=row["residual_split"],
    )
    work = stack.work(split, MATRIX_UNIT[row["generation"]])
    work += roofline.head(m["vocab"], m["width"], tokens, split, again=row["head_recomputed"])
    return work + roofline.optimizer(row["parameters"], split)


def counted_flops(row: dict[str, Any]) -> float:
    """FLOPs per chip and step by the count behind the published figure: six a parameter and token, and attention."""
    m, T = row["model"], row["length"]
    heads = m["heads"] * m["head_dim"]
    looked_up = 0 if m["tied"] else m["vocab"] * m["width"]
    local = m["layers"] - m["layers"] // m["global_every"] if m["global_every"] else 0
    seen = (m["layers"] - local) * T + local * m["window"]
    attention = 12 * heads * seen / (2 if row["count"] == "causal" else 1)
    return row["rows_per_chip"] * T * (6 * (row["parameters"] - looked_up) + attention)


def modelled_mfu(row: dict[str, Any], work: Work, efficiency: float) -> float:
    seconds = step_time(work, row["generation"], efficiency).seconds
    return mfu(counted_flops(row), seconds, 1, CHIPS[row["generation"]].peak_bf16_flops)


def fit(rows: Sequence[dict[str, Any]]) -> float:
    """The efficiency with the least mean square of log(modelled / published MFU), to four decimals."""
    works = [work_of(row) for row in rows]

    def loss(efficiency: float) -> float:
        return sum(
            math.log(modelled_mfu(row, work, efficiency) / row["published"]["mfu"]) ** 2
            for row, work in zip(rows, works, strict=True)
        )

    return min((step / 1e4 for step in range(1000, 10001)), key=loss)


def evaluate(rows: Sequence[dict[str, Any]], efficiency: dict[str, float]) -> list[dict[str, Any]]:
    """Published and modelled MFU of every run, the error relative to what was published, and where the time goes."""
    out = []
    for row in rows:
        work, published = work_of(row), row["published"]["mfu"]
        modelled = modelled_mfu(row, work, efficiency[row["generation"]])
        out.append(
            {key: row[key] for key in ("name", "generation", "half")}
            | {"published_mfu": published, "modelled_mfu": round(modelled, 4)}
            | {"error": round(modelled / published - 1, 4)}
            | {"seconds": _parts(step_time(work, row["generation"], efficiency[row["generation"]]))}
        )
    return out


def errors(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean and largest absolute error, by half and generation."""
    out = {}
    for half in ("fit", "held out"):
        for generation in ("all", *GENERATIONS):
            found = [abs(r["error"]) for r in results if r["half"] == half and generation in ("all", r["generation"])]
            out[f"{half}, {generation}"] = {"mean": round(sum(found) / len(found), 4), "largest": max(found)}
    return out


def fitted(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    return {g: fit([r for r in rows if r["generation"] == g and r["half"] == "fit"]) for g in GENERATIONS}


def variants(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The fit and its error on the held-out half with other constants than the stated ones."""

    def fit_again(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        efficiency = fitted(rows)
        return {"efficiency": efficiency, "held out": errors(evaluate(rows, efficiency))["held out, all"]}

    out = {"residual whole on every chip (the first fit)": fit_again([{**r, "residual_split": False} for r in rows])}
    ratio = roofline.ATTENTION_RATIO
    try:
        for roofline.ATTENTION_RATIO in RATIOS:
            out[f"attention ratio {roofline.ATTENTION_RATIO:.2f}"] = fit_again(rows)
    finally:
        roofline.ATTENTION_RATIO = ratio
    return out


def ours(efficiency: dict[str, float]) -> dict[str, Any]:
    """Modelled MFU of the released model, one row a chip, everything trained, with images and with text alone."""
    config, filled = ModelConfig(), round(LENGTH * FILLED)
    out: dict[str, Any] = {}
    for name, split in SLICES.items():
        topology = parse_topology(name)
        rows = topology.chips
        for images in (True, False):
            work = Workload.of_examples(rows * filled / EXAMPLE, EXAMPLE, [IMAGE] if images else [])
            useful = step_flops(config, work).total
            for policy in POLICIES:
                executed = roofline.executed_work(
                    config,
                    topology.generation,
                    split,
                    rows=rows,
                    length=LENGTH,
                    examples=_packed(filled, EXAMPLE),
                    vision_rows=int(images),
                    num_patches=NUM_PATCHES if images else 0,
                    images=_packed(round(filled * IMAGE / EXAMPLE), IMAGE) if images else (),
                    decoder_recompute=RECOMPUTE[policy],
                )
                time = step_time(executed, topology.generation, efficiency[topology.generation])
                share = mfu(useful, time.seconds, topology.chips, topology.peak_bf16_flops)
                key = f"{name}, {'text and images' if images else 'text'}, {policy}"
                out[key] = {
                    "modelled_mfu": round(share, 4),
                    "tokens_per_second_per_chip": round(filled / time.seconds),
                    "seconds": _parts(time),
                }
    return out


def _packed(filled: int, size: int) -> list[int]:
    whole, rest = divmod(filled, size)
    return [size] * whole + [rest] * (rest > 0)


def _parts(time: roofline.StepTime) -> dict[str, float]:
    return {part: round(seconds, 4) for part, seconds in dataclasses.asdict(time).items()} | {
        "all": round(time.seconds, 4)
    }


def plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6.4, 6.2), layout="constrained")
    axes.plot([0.3, 0.8], [0.3, 0.8], color="0.5", linewidth=1)
    axes.fill_between([0.3, 0.8], [0.285, 0.76], [0.315, 0.84], color="0.9", label="within 5 %")
    colors = dict(zip(GENERATIONS, ("#1f77b4", "#d95f02", "#2a9d54"), strict=True))
    for generation, color in colors.items():
        for half, face in (("fit", color), ("held out", "white")):
            found = [r for r in results if r["generation"] == generation and r["half"] == half]
            x, y = [r["published_mfu"] for r in found], [r["modelled_mfu"] for r in found]
            axes.scatter(x, y, s=52, color=color, facecolor=face, label=f"{generation}, {half}", zorder=3)
            for r in found:
                # Away from the diagonal; these few also away from each other.
                shift = {("v6e", "mistral-7b (8 chips)"): -9, ("v6e", "llama3.1-8b"): 9, ("v5p", "64B"): 11}
                left = r["modelled_mfu"] > r["published_mfu"]
                axes.annotate(
                    r["name"].split(" ")[0],
                    (r["published_mfu"], r["modelled_mfu"]),
                    xytext=(-7 if left else 7, shift.get((generation, r["name"]), 0)),
                    textcoords="offset points",
                    ha="right" if left else "left",
                    va="center",
                    fontsize=8,
                )
    axes.set(xlabel="published MFU", ylabel="modelled MFU", xlim=(0.34, 0.78), ylim=(0.34, 0.78), aspect="equal")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0, decimals=0))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows = json.loads((RESULTS / "roofline_rows.json").read_text())["rows"]
    efficiency = fitted(rows)
    results = evaluate(rows, efficiency)
    report: dict[str, Any] = {
        "efficiency": efficiency,
        "errors": errors(results),
        "rows": results,
        "variants": variants(rows),
        "ours": ours(efficiency),
    }
    (RESULTS / "roofline.json").write_text(json.dumps(report, indent=1) + "\n")
    plot(results, RESULTS / "roofline.png")
    for r in results:
        print(
            f"{r['generation']:4} {r['name']:22} {r['half']:9} published {r['published_mfu']:6.1%}  "
            f"modelled {r['modelled_mfu']:6.1%}  error {r['error']:+6.1%}"
        )
    print("efficiency:", efficiency)
    for key, error in errors(results).items():
        print(f"{key}: mean error {error['mean']:.1%}, largest {error['largest']:.1%}")
    for key, values in report["ours"].items():
        print(f"{key}: modelled MFU {values['modelled_mfu']:.1%}, {values['seconds']}")
    if efficiency != roofline.EFFICIENCY:
        print("phivision_jax/preflight/model/roofline.py has other efficiencies: copy these there")


if __name__ == "__main__":
    main()
