"""Tables of docs/preflight.md, from docs/results. ``benchmarks/preflight.py`` writes them, a test compares them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from phivision_jax.hardware.topology import GIB, parse_topology
from tests.support.paths import ROOT

RESULTS, PAGE = ROOT / "docs/results", ROOT / "docs/preflight.md"
STAGES = ("stage1", "stage2", "stage3")
SLICES = (("v5e:16x16", 1), ("v6e:16x16", 1), ("v5p:4x4x8", 1), ("v5p:4x4x8", 2))


def result_path(stage: str, topology: str, slices: int) -> Path:
    """The committed report of a stage on a slice."""
    several = f"_x{slices}" if slices > 1 else ""
    return RESULTS / "preflight" / f"{stage}_{topology.partition(':')[0]}{several}.json"


def stages_table() -> str:
    """Markdown table with a line per compiled stage and slice."""
    lines = [
        "| stage | slice | mesh | remat, microbatches | compiled in | peak of HBM, GiB | free | modelled step | "
        "modelled MFU | tokens/s per chip |",
        "| --- " * 10 + "|",
    ]
    for stage in STAGES:
        for topology, slices in SLICES:
            path = result_path(stage, topology, slices)
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


def generation_table() -> str:
    """Markdown table with a line per form of the weights and slice."""
    lines = [
        "| weights, cache | slice | mesh | most sequences | peak of HBM, GiB | temporaries of decoding, of the cache | "
        "large copies | bytes per token, of the bound | modelled time per token | of the bound | tokens/s |",
        "| --- " * 11 + "|",
    ]
    for path in sorted((RESULTS / "hardware").glob("inference*.json")):
        r = json.loads(path.read_text())
        mesh = " × ".join(f"{axis} {size}" for axis, size in r["mesh"].items() if size > 1)
        lines.append(
            f"| {r['weights'] or 'bfloat16'}, {r['cache']} | {r['topology']} | {mesh or 'one chip'} | "
            f"{r['slots']} × {r['length']:,} | "
            f"{r['peak_bytes_per_chip'] / GIB:.2f} of {r['hbm_bytes_per_chip'] / GIB:.2f} | "
            f"{r['decode_temporary_share']:.1%} | {len(r['decode_copies']) or 'none'} | "
            f"{r['decode_bytes_over_bound']:.2f} | {r['modelled_decode_step_seconds'] * 1000:.1f} ms | "
            f"{r['modelled_decode_time_over_bound']:.2f} | {r['modelled_decode_tokens_per_second']:,.0f} |"
        )
    return "\n".join(lines)


FORMS = {"causal": "causal", "bidirectional": "bidirectional", "dense_mask": "dense mask", "plain": "plain"}


def attention_table() -> str:
    """Markdown table with a line per chip and length."""
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
    """Markdown table with a line per tower and length."""
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


def update_tables(page: str) -> str:
    """Replace the tables of docs/preflight.md with those of the committed results."""
    for name, table in (
        ("stages", stages_table()),
        ("generation", generation_table()),
        ("attention", attention_table()),
        ("attention on a GPU", gpu_table()),
    ):
        before, begin, rest = page.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- end of {name} -->")
        page = before + begin + table + "\n" + end + after
    return page
