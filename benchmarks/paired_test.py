"""Error rate and power of the paired test of two evaluation runs, in simulated repeats.

    python benchmarks/paired_test.py                                       # a table
    python benchmarks/paired_test.py --out docs/results/paired_test.json   # the committed numbers

Two runs answer the same 4,000 items and differ on 15 % of them. Either run b is better by 5 points, or neither is
better. Items are independent, or in clusters of 5 (questions on one image) with a correlation within the cluster. Each
repeat asks McNemar's test, which takes items for independent, and ``evaluation.statistics.paired_test`` for a
difference at p < 0.01; the table has the share of repeats in which they report one. A rate of 1 % needs thousands of
repeats to be seen: 5 % of simulations with 200 repeats show more than 2 % by chance.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from phivision_jax.evaluation.statistics import smallest_difference
from tests.support.paired_runs import DISCORDANT, Case, simulate

ITEMS, LEVEL = 4_000, 0.01
CASES = [Case(difference, *clusters) for clusters in [(1, 0.0), (5, 0.25), (5, 0.5)] for difference in (0.0, 0.05)]


def main(repeats: int = 2_000, out: Path | None = None) -> None:
    """Print the rates.

    Args:
        repeats: simulated comparisons in each case.
        out: JSON file to write.
    """
    table = Table("true difference", "cluster size", "correlation", "McNemar", "by cluster", "smallest at 80 % power")
    cases = []
    for case in CASES:
        rates = simulate(case, repeats, ITEMS, LEVEL)
        smallest = smallest_difference(rates.se, ITEMS // case.cluster_size)
        cases.append({**case._asdict(), **rates._asdict(), "smallest_difference": smallest})
        names = f"{100 * case.difference:.0f} points", f"{case.cluster_size}", f"{case.correlation}"
        shares = f"{100 * rates.mcnemar:.1f} %", f"{100 * rates.clustered:.1f} %", f"{100 * smallest:.1f} points"
        table.add_row(*names, *shares)
    Console().print(table, f"differences reported at p < {LEVEL}, share of {repeats:,} repeats of {ITEMS:,} items")
    if out is not None:
        settings = {"items": ITEMS, "discordant": DISCORDANT, "level": LEVEL, "repeats": repeats}
        out.write_text(json.dumps(settings | {"cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
