"""Fit the modelled step time to half of MaxText's published runs and measure the error on the other half.

    python -m benchmarks.roofline            # a table, docs/results/roofline.json and .png; seconds, no TPU

docs/results/roofline_rows.json lists the runs and the rule that divides them; docs/roofline.md explains. Then follows
the released model at T = 8,192 on three slices, by remat policy. All times are modelled.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from phivision_jax.preflight.model import roofline
from tests.support.published_runs import GENERATIONS, RESULTS, errors, evaluate, fit_generations, our_model

RATIOS = (0.5, 2 / 3, 1.0)
"""Values of ATTENTION_RATIO to try, to show its effect."""


def variants(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Fits with other constants, and their error on the held-out half."""

    def fit_again(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        efficiency = fit_generations(rows)
        return {"efficiency": efficiency, "held out": errors(evaluate(rows, efficiency))["held out, all"]}

    out = {"residual unsplit (the first fit)": fit_again([{**r, "residual_split": False} for r in rows])}
    ratio = roofline.ATTENTION_RATIO
    try:
        for roofline.ATTENTION_RATIO in RATIOS:
            out[f"attention ratio {roofline.ATTENTION_RATIO:.2f}"] = fit_again(rows)
    finally:
        roofline.ATTENTION_RATIO = ratio
    return out


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
    efficiency = fit_generations(rows)
    results = evaluate(rows, efficiency)
    report: dict[str, Any] = {
        "efficiency": efficiency,
        "errors": errors(results),
        "rows": results,
        "variants": variants(rows),
        "ours": our_model(efficiency),
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
        print("phivision_jax/preflight/model/roofline.py has other efficiencies; copy these into EFFICIENCY")


if __name__ == "__main__":
    main()
