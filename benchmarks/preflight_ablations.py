"""Run ``phivision preflight`` for the variants of configs/ablations/resolution.py on two slices, and tabulate it.

python -m benchmarks.preflight_ablations            # compiles what docs/results lacks: up to half an hour on two cores
python -m benchmarks.preflight_ablations --tables   # only rewrites the table of docs/image_strategies.md
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import tyro

from benchmarks.tables import fill, markdown
from phivision_jax.hardware.topology import GIB
from tests.support.paths import ROOT

RESULTS, PAGE = ROOT / "docs/results/preflight_ablations", ROOT / "docs/image_strategies.md"
VARIANTS = ("dynamic_s2", "multicrop", "multicrop_s2", "dynamic_2048", "dynamic_3600", "early_fusion")
SLICES = ("v5e:16x16", "v5p:4x4x4")


def result_path(variant: str, topology: str) -> Path:
    """The committed report of a variant on a slice."""
    return RESULTS / f"{variant}_{topology.partition(':')[0]}.json"


def table() -> str:
    """Markdown table with a line per compiled variant and slice.

    Modelled times are left out: they assume the recipe's mean image with one token per patch.
    """
    head = ["variant", "slice", "patches of a row", "microbatches", "compiled in", "peak of HBM, GiB", "free"]
    head += ["products per step, PFLOP"]
    paths = [result_path(variant, topology) for variant in VARIANTS for topology in SLICES]
    return markdown(head, [_line(json.loads(path.read_text())) for path in paths if path.exists()])


def _line(r: dict[str, Any]) -> tuple[object, ...]:
    peak = f"{r['peak_bytes_per_chip'] / GIB:.2f} of {r['hbm_bytes_per_chip'] / GIB:.2f}"
    free, products = "too large", ""
    if r["fits"]:
        free, products = f"{r['free_share']:.0%}", f"{r['matmul_flops_compiled'] / 1e15:.1f}"
    variant, patches, seconds = r["config"].rpartition(":")[2], f"{r['num_patches']:,}", f"{r['compile_seconds']:.0f} s"
    return variant, r["topology"], patches, r["microbatches"], seconds, peak, free, products


def main(tables: bool = False) -> None:
    """Compile what is missing and write the table into docs/image_strategies.md.

    Args:
        tables: Only write the table, from the committed results.
    """
    for variant in () if tables else VARIANTS:
        for topology in SLICES:
            out = result_path(variant, topology)
            if out.exists():
                continue
            command = [sys.executable, "-m", "phivision_jax.cli", "preflight", f"--json={out}"]
            command += [f"--config=configs/ablations/resolution.py:{variant}", f"--topology={topology}"]
            subprocess.run(command, cwd=ROOT, check=True)
            out.with_suffix(".png").unlink()
    PAGE.write_text(fill(PAGE.read_text(), "preflight", table()))


if __name__ == "__main__":
    tyro.cli(main)
