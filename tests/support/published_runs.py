"""Modelled MFU of published training runs, the fit of efficiencies to them, and our model's own figures.

``benchmarks/roofline.py`` writes them to docs/results/roofline.json; tests compute them again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from phivision_jax.hardware.flops import mfu, step_flops
from phivision_jax.hardware.topology import CHIPS, parse_topology
from phivision_jax.preflight.model import chip_work, modelled_step, roofline
from phivision_jax.preflight.model.chip_work import MATRIX_UNIT, Stack, visited_pairs
from phivision_jax.preflight.model.roofline import Work, step_time
from phivision_jax.training.run_config import DataConfig, MeshConfig, ResolvedConfig
from tests.support.paths import ROOT

RESULTS = ROOT / "docs" / "results"
GENERATIONS = ("v5e", "v5p", "v6e")

LENGTH, PATCHES = 8192, 7168
EXAMPLE, IMAGE = 3000, 1830
"""Tokens of an example, of which these are its one image's."""
SLICES = {
    "v5p:4x4x8": {"data": 4, "fsdp": 32},
    "v5e:16x16": {"data": 8, "fsdp": 32},
    "v6e:16x16": {"data": 8, "fsdp": 32},
}
POLICIES = ("full", "attention", "dots", "none")


def mesh_of(**sizes: int) -> MeshConfig:
    """A mesh with these axes; all others are 1."""
    return MeshConfig(**({"slice": 1, "data": 1, "fsdp": 1, "context": 1} | sizes))


def work_of(row: dict[str, Any]) -> Work:
    """Work of a chip in a published run, a row of docs/results/roofline_rows.json."""
    m, mesh = row["model"], mesh_of(fsdp=row["fsdp"], tensor=row["tensor"])
    T, tokens = row["length"], row["rows_per_chip"] * row["length"]
    blocks = row["attention"]
    local = m["layers"] - m["layers"] // m["global_every"] if m["global_every"] else 0

    def pairs(block: Sequence[int]) -> float:
        everywhere = visited_pairs(T, [T], *block) * (m["layers"] - local)
        nearby = visited_pairs(T, [T], *block, window=m["window"]) * local if local else 0
        return row["rows_per_chip"] * (everywhere + nearby)

    # A backward kernel has five products, or four (without dq) beside a kernel with the three that dq needs.
    backward = (
        4 * pairs(blocks["backward"]) + 3 * pairs(blocks["dq"]) if blocks["dq"] else 5 * pairs(blocks["backward"])
    )
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
        attention=(2 * pairs(blocks["forward"]), backward),
        recompute=frozenset(row["recompute"]) | {"elementwise"},
        residual_split=row["residual_split"],
    )
    work = stack.work(mesh, MATRIX_UNIT[row["generation"]])
    work += chip_work.head(m["vocab"], m["width"], tokens, mesh, again=row["head_recomputed"])
    return work + chip_work.optimizer(row["parameters"], mesh)


def counted_flops(row: dict[str, Any]) -> float:
    """FLOPs per chip and step as the published figure counts them: six per parameter and token, and attention."""
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
    """Efficiency with the least mean square of log(modelled / published MFU), to four decimals."""
    works = [work_of(row) for row in rows]

    def loss(efficiency: float) -> float:
        return sum(
            math.log(modelled_mfu(row, work, efficiency) / row["published"]["mfu"]) ** 2
            for row, work in zip(rows, works, strict=True)
        )

    return min((step / 1e4 for step in range(1000, 10001)), key=loss)


def evaluate(rows: Sequence[dict[str, Any]], efficiency: dict[str, float]) -> list[dict[str, Any]]:
    """Published and modelled MFU of every run, the relative error, and the modelled time by part."""
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
    """Mean and largest absolute error by half and generation."""
    out = {}
    for half in ("fit", "held out"):
        for generation in ("all", *GENERATIONS):
            found = [abs(r["error"]) for r in results if r["half"] == half and generation in ("all", r["generation"])]
            out[f"{half}, {generation}"] = {"mean": round(sum(found) / len(found), 4), "largest": max(found)}
    return out


def fit_generations(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The efficiency of each generation, fitted to its half of the runs."""
    return {g: fit([r for r in rows if r["generation"] == g and r["half"] == "fit"]) for g in GENERATIONS}


def our_model(efficiency: dict[str, float]) -> dict[str, Any]:
    """Modelled MFU of the fully trained released model, one row per chip, with images and with text alone."""
    out: dict[str, Any] = {}
    for name, sizes in SLICES.items():
        topology = parse_topology(name)
        for images in (True, False):
            mix = modelled_step.Mix(EXAMPLE, IMAGE if images else 0)
            for policy in POLICIES:
                data = DataConfig(batch_rows=topology.chips, length=LENGTH, num_patches=PATCHES if images else 0)
                cfg = ResolvedConfig(data=data, mesh=mesh_of(**sizes), remat=policy, vision_remat="full")
                useful = step_flops(cfg.model, modelled_step.workload(cfg, mix)).total
                executed = modelled_step.executed(cfg, topology.generation, mix)
                time = step_time(executed, topology.generation, efficiency[topology.generation])
                share = mfu(useful, time.seconds, topology.chips, topology.chip.peak_bf16_flops)
                key = f"{name}, {'text and images' if images else 'text'}, {policy}"
                out[key] = {
                    "modelled_mfu": round(share, 4),
                    "tokens_per_second_per_chip": round(round(LENGTH * modelled_step.FILLED) / time.seconds),
                    "seconds": _parts(time),
                }
    return out


def _parts(time: roofline.StepTime) -> dict[str, float]:
    return {part: round(seconds, 4) for part, seconds in dataclasses.asdict(time).items()} | {
        "all": round(time.seconds, 4)
    }
