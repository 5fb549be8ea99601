"""Plot the small model's accuracy on easy-VQA's test questions during training, with the question-only baseline.

    python benchmarks/plot_easy_vqa.py --collect runs/tiny runs/tiny-long   # runs → docs/results/easy_vqa.json
    python benchmarks/plot_easy_vqa.py                                      # that file → docs/results/easy_vqa.png

The curves are the accuracy that training measured on an even sample of the test questions; the marks are eval.py on
all of them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from phivision_jax.data.sources.easy_vqa import easy_vqa, question_only_baseline
from phivision_jax.training.telemetry.metrics import read_metrics

RESULTS = Path(__file__).parents[1] / "docs" / "results"


def collect(runs: list[Path]) -> dict[str, Any]:
    """The curves and final scores of finished runs (each with ``eval/report.json``)."""
    curves = {}
    for run in runs:
        report = json.loads((run / "eval" / "report.json").read_text())
        rows = [row for row in read_metrics(run) if "eval/accuracy" in row]
        curves[run.name] = {
            "step": [row["step"] for row in rows],
            "minutes": [round(row["elapsed_s"] / 60, 3) for row in rows],
            "accuracy": [row["eval/accuracy"] for row in rows],
            "sampled_questions": int(rows[-1]["eval/examples"]),
            "final_accuracy": report["accuracy"],
            "final_questions": report["count"],
        }
    return {"question_only": question_only_baseline(easy_vqa("train"), easy_vqa("test")), "runs": curves}


def plot(results: dict[str, Any], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    baseline = results["question_only"]
    axes.axhline(baseline, color="0.4", linestyle="--", linewidth=1)
    axes.text(
        0.99, baseline + 0.008, f"question alone: {baseline:.1%}", ha="right", transform=axes.get_yaxis_transform()
    )
    for color, (name, run) in zip(("#1f77b4", "#d95f02", "#2a9d54"), results["runs"].items(), strict=False):
        label = f"{name}: {run['final_accuracy']:.1%} of {run['final_questions']:,} after {run['minutes'][-1]:.0f} min"
        axes.plot(run["minutes"], run["accuracy"], color=color, label=label)
        axes.plot(run["minutes"][-1], run["final_accuracy"], "o", color=color)
    axes.set(xlabel="minutes of training on two CPU cores", ylabel="accuracy on test questions", ylim=(0.5, 1.0))
    axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0, decimals=0))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collect", nargs="+", type=Path, metavar="RUN", help="finished runs to take the numbers from")
    args = parser.parse_args()
    file = RESULTS / "easy_vqa.json"
    if args.collect:
        RESULTS.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(collect(args.collect), indent=1) + "\n")
    plot(json.loads(file.read_text()), RESULTS / "easy_vqa.png")
    print(f"wrote {RESULTS / 'easy_vqa.png'}")


if __name__ == "__main__":
    main()
