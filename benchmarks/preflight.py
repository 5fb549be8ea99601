"""Run ``phivision preflight`` for the recipe's three stages on four slices, and write the tables of docs/preflight.md.

python -m benchmarks.preflight              # compiles all twelve: half an hour on two cores
python -m benchmarks.preflight --tables     # only rewrites the tables, from docs/results
"""

from __future__ import annotations

import subprocess
import sys

import tyro

from tests.support.paths import ROOT
from tests.support.preflight_tables import PAGE, SLICES, STAGES, result_path, update_tables


def main(tables: bool = False) -> None:
    """Compile everything and write the tables into docs/preflight.md.

    Args:
        tables: Only write the tables, from the committed results.
    """
    for stage in () if tables else STAGES:
        for topology, slices in SLICES:
            out = result_path(stage, topology, slices)
            command = [sys.executable, "-m", "phivision_jax.cli", "preflight", "--plot", str(out.with_suffix(".png"))]
            command += [f"--config=configs/phi4_rv_15b.py:{stage}", f"--topology={topology}", f"--slices={slices}"]
            subprocess.run([*command, f"--json={out}"], cwd=ROOT, check=True)
            out.with_suffix(".png").unlink()
    PAGE.write_text(update_tables(PAGE.read_text()))


if __name__ == "__main__":
    tyro.cli(main)
