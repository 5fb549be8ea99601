"""``phivision preflight`` for the three stages of the recipe on four slices, and the tables of docs/preflight.md.

python benchmarks/preflight.py              # compiles all twelve: half an hour on two cores
python benchmarks/preflight.py --tables     # only writes the tables again, from docs/results
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import tyro

from phivision_jax.hardware.topology import GIB, parse_topology

ROOT = Path(__file__).parent.parent
RESULTS, PAGE = ROOT / "docs/results", ROOT / "docs/preflight.md"
STAGES = ("stage1", "stage2", "stage3")
SLICES = (("v5e:16x16", 1), ("v6e:16x16", 1), ("v5p:4x4x8", 1), ("v5p:4x4x8", 2))


def result(stage: str, topology: str, slices: int) -> Path:
    several = f"_x{slices}" if slices > 1 else ""
    return RESULTS / "preflight" / f"{stage}_{topology.partition(':')[0]}{several}.json"


def stages_table() -> str:
    """Markdown, one line per stage and slice that was compiled."""
    lines = [
        "| stage | slice | mesh | remat, microbatches | compiled in | peak of HBM, GiB | free | modelled step | "
        "modelled MFU | tokens/s per chip |",
        "| --- " * 10 + "|",
    ]
    for stage in STAGES:
        for topology, slices in SLICES:
            path = result(stage, topology, slices)
            if path.exists():
                lines.append(_line(stage, json.loads(path.read_text())))
    return "\n".join(lines)


def _line(stage: str, r: dict[str, Any]) -> str:
    where = parse_topology(r["topology"], r["slices"])
    several = f"{r['slices']} × " if r["slices"] > 1 else ""
    mesh = " × ".join(f"{axis} {size}" for axis, size in r["mesh"].items() if size > 1)
    head = f"| {stage} | {several}{where.xla_name} | {mesh} | {r['remat']}, {r['microbatches']} | "
    hbm = r["hbm_bytes_per_chip"] / GIB
    if not r["fits"]:
        return (
            head
            + f"{r['compile_seconds']:.0f} s | {r['peak_bytes_per_chip'] / GIB:.2f} of {hbm:.2f} | too large | | | |"
        )
    return head + (
        f"{r['compile_seconds']:.0f} s | {r['peak_bytes_per_chip'] / GIB:.2f} of {hbm:.2f} | {r['free_share']:.0%} | "
        f"{r['modelled_step_seconds']:.2f} s | {r['modelled_mfu']:.1%} | "
        f"{r['modelled_tokens_per_second_per_chip']:,.0f} |"
    )


FORMS = {"causal": "causal", "bidirectional": "bidirectional", "dense_mask": "dense mask", "plain": "plain"}


def attention_table() -> str:
    """Markdown, one line per chip and length."""
    rows = json.loads((RESULTS / "attention_memory.json").read_text())
    found = {(row["chip"], row["length"], row["form"]): row for row in rows}
    lines = ["| chip | T | " + " | ".join(f"{name}: temporaries (mask), MiB" for name in FORMS.values()) + " |"]
    lines.append("| --- " * (2 + len(FORMS)) + "|")
    for chip, length in dict.fromkeys((row["chip"], row["length"]) for row in rows):
        cells = " | ".join(_cell(found[chip, length, form]) for form in FORMS)
        lines.append(f"| {chip} | {length:,} | {cells} |")
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    if row["temp_mib"] is not None:
        return f"{row['temp_mib']:,.0f} ({row['mask_mib']:.2f})"
    return f"does not fit: {row['needed_mib']:,.0f}" if row["needed_mib"] else "does not compile"


GPU_FORMS = {"kernels": "kernels", "blocks": "blocks, no kernel", "plain": "plain"}


def gpu_table() -> str:
    """Markdown, one line per tower and length."""
    facts = json.loads((RESULTS / "attention_gpu.json").read_text())
    rows = facts["rows"]
    found = {(row["tower"], row["length"], row["form"]): row["temp_mib"] for row in rows}
    lines = ["| tower | T | " + " | ".join(f"{name}: temporaries, MiB" for name in GPU_FORMS.values()) + " |"]
    lines.append("| --- " * (2 + len(GPU_FORMS)) + "|")
    for tower, length in dict.fromkeys((row["tower"], row["length"]) for row in rows):
        sizes = [found[tower, length, form] for form in GPU_FORMS]
        cells = [f"{'' if size < facts['memory_mib'] else 'does not fit: '}{size:,.0f}" for size in sizes]
        lines.append(f"| {tower} | {length:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def written(page: str) -> str:
    """The page with its tables made again."""
    for name, table in (
        ("stages", stages_table()),
        ("attention", attention_table()),
        ("attention on a GPU", gpu_table()),
    ):
        before, begin, rest = page.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- end of {name} -->")
        page = before + begin + table + "\n" + end + after
    return page


def main(tables: bool = False) -> None:
    """Compile everything and write the tables into docs/preflight.md.

    Args:
        tables: Only write the tables.
    """
    for stage in () if tables else STAGES:
        for topology, slices in SLICES:
            out = result(stage, topology, slices)
            command = [sys.executable, "-m", "phivision_jax.cli", "preflight", "--plot", str(out.with_suffix(".png"))]
            command += [f"--config=configs/phi4_rv_15b.py:{stage}", f"--topology={topology}", f"--slices={slices}"]
            subprocess.run([*command, f"--json={out}"], cwd=ROOT, check=True)
            out.with_suffix(".png").unlink()
    PAGE.write_text(written(PAGE.read_text()))


if __name__ == "__main__":
    tyro.cli(main)
