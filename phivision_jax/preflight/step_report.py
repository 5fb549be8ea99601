"""Report of a compiled training step: one dict of plain values, a text for the terminal, and a figure."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from phivision_jax.hardware.topology import GIB, Topology
from phivision_jax.io import html
from phivision_jax.io.messages import shorten
from phivision_jax.preflight.model import modelled_step
from phivision_jax.training.run_config import ResolvedConfig

MARGIN = 0.1
"""Share of the HBM that should stay free for the runtime and for programs beside the step."""
STAGE_TOKENS = {"stage1": 1.4e9, "stage2": 188.5e9, "stage3": 12e9}
"""Tokens of the recipe's stages, for configurations that train to the end of their data."""


def summary(cfg: ResolvedConfig, where: Topology, facts: Mapping[str, Any], low_effort: bool) -> dict[str, Any]:
    """All facts and modelled figures of a step as JSON values (``--json`` writes them); bytes are per chip."""
    per_chip = where.chip.devices
    memory = {name: size * per_chip for name, size in facts["memory"].items()}
    out: dict[str, Any] = {
        "topology": where.xla_name,
        **{name: getattr(where, name) for name in ("cloud_name", "slices", "chips", "hosts")},
        "effort": "low" if low_effort else "default",
        "mesh": facts["mesh"],
        **{name: getattr(cfg, name) for name in ("remat", "vision_remat", "microbatches")},
        **{name: getattr(cfg.data, name) for name in ("batch_rows", "length", "vision_rows", "num_patches")},
        **memory_facts(where, facts),
        "memory_bytes_per_chip": memory,
        "largest_buffers": [buffer._asdict() for buffer in facts["buffers"]],
        "checkpoint_bytes": facts["checkpoint_bytes"],
    }
    if not facts["fits"]:
        return out
    host, limit = facts["host_bytes"] * per_chip, where.chip.host_bytes
    out["free_share"] = 1 - max(out["peak_bytes_per_chip"] / where.chip.hbm_bytes, host / limit)
    memory["activations"] = max(out["peak_bytes_per_chip"] - sum(memory.values()), 0)
    out |= {"host_bytes_per_chip": host, "host_limit_per_chip": limit, "fits": host < limit}
    out["collectives"] = by_kind_and_axes(facts["collectives"])
    out["largest_collective"] = max(facts["collectives"], key=lambda one: one["result_bytes"], default=None)
    out["matmul_flops_compiled"] = facts["matmul_flops"] * where.devices
    try:
        out |= modelled_step.speed(cfg, where, modelled_step.Mix.of_recipe(cfg), facts)
        out["tokens"] = cfg.optim.steps * out["tokens_per_step"] or STAGE_TOKENS.get(cfg.data.stage, 1e9)
        return out | {"modelled_chip_hours": out["tokens"] / out["modelled_tokens_per_second_per_chip"] / 3600}
    except ValueError as error:  # v4, tpu7x: no published runs to fit
        return out | {"modelled_step_seconds": None, "modelled_mfu": None, "not_modelled": str(error)}


def memory_facts(where: Topology, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of any program that ``verdict`` reports."""
    needed = facts["peak_bytes"]
    return {
        **{name: facts[name] for name in ("compile_seconds", "fits")},
        "peak_bytes_per_chip": None if needed is None else needed * where.chip.devices,
        "hbm_bytes_per_chip": where.chip.hbm_bytes,
    }


def by_kind_and_axes(found: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Sum collectives by kind and mesh axes, most bytes first."""
    rows: dict[tuple, dict[str, Any]] = {}
    sums = ("times", "result_bytes", "wire_bytes", "waited_wire_bytes", "largest_result_bytes")
    for one in found:
        empty = {"kind": one["kind"], "axes": list(one["axes"])} | dict.fromkeys(sums, 0)
        row = rows.setdefault((one["kind"], tuple(one["axes"])), empty)
        row["times"] += one["times"]
        row["result_bytes"] += one["result_bytes"] * one["times"]
        row["wire_bytes"] += one["wire_bytes"]
        row["waited_wire_bytes"] += 0 if one["overlapped"] else one["wire_bytes"]
        row["largest_result_bytes"] = max(row["largest_result_bytes"], one["result_bytes"])
    return sorted(rows.values(), key=lambda row: -row["wire_bytes"])


def text(r: Mapping[str, Any]) -> str:
    """The report for a terminal."""
    axes = " x ".join(f"{axis} {size}" for axis, size in r["mesh"].items() if size > 1) or "one device"
    lines = [
        f"  {axes}; remat {r['remat']} (vision {r['vision_remat']}), {r['microbatches']} microbatches of "
        f"{r['batch_rows'] // r['microbatches']} rows x {r['length']:,} tokens, "
        f"{r['vision_rows']} x {r['num_patches']:,} patches",
        f"  compiled at {r['effort']} effort in {r['compile_seconds']:.0f} s",
        "",
        verdict(r),
    ]
    lines += [f"    {name:<14}{_gib(size)}" for name, size in r["memory_bytes_per_chip"].items()]
    if r.get("host_bytes_per_chip"):
        lines.append(f"    {'on the host':<14}{_gib(r['host_bytes_per_chip'])} of {_gib(r['host_limit_per_chip'])}")
    if r["largest_buffers"]:
        lines.append("  largest buffers at the peak: instruction, type, and the scopes that made them")
        lines += [f"    {_gib(one['bytes'])}  {one['what']}" for one in r["largest_buffers"][:6]]
    lines.append(f"  checkpoint      {_gib(r['checkpoint_bytes'])} (parameters and optimizer, all chips)")
    if "collectives" not in r:
        return "\n".join(lines)
    lines += ["", "collectives, per chip and step    times      on the wire       waited for   largest result"]
    lines += [
        f"  {one['kind'] + ' over ' + ('+'.join(one['axes']) or 'nothing'):<30}{one['times']:>7,}"
        f"{_gib(one['wire_bytes']):>17}{_gib(one['waited_wire_bytes']):>17}{_gib(one['largest_result_bytes']):>17}"
        for one in r["collectives"]
    ]
    sent, waited = (sum(one[key] for one in r["collectives"]) for key in ("wire_bytes", "waited_wire_bytes"))
    lines += [f"  nothing is overlapped at {r['effort']} effort: the chips wait for all of it"] * (0 < sent == waited)
    return "\n".join([*lines, "", *_speed(r)])


def _speed(r: Mapping[str, Any]) -> list[str]:
    if r["modelled_step_seconds"] is None:
        return [f"not modelled: {r['not_modelled']}"]
    parts = ", ".join(f"{name.replace('_', ' ')} {s:.2f}" for name, s in r["modelled_parts_seconds"].items() if s)
    compiled = r["matmul_flops_compiled"]
    return [
        "modelled, not measured (docs/roofline.md), for examples of "
        f"{r['example_tokens']:,} tokens of which {r['example_patches']:,} are an image's",
        f"  step            {r['modelled_step_seconds']:.2f} s ({parts})",
        f"  MFU             {r['modelled_mfu']:.1%}",
        f"  FLOPs           {r['flops_per_step']:.3e} useful; matrix products of the program {compiled:.3e}, "
        f"{compiled / r['matmul_flops_implied']:.3f} of what padding and remat imply",
        f"  tokens/s        {r['modelled_tokens_per_second']:,.0f} "
        f"({r['modelled_tokens_per_second_per_chip']:,.0f} per chip)",
        f"  {f'{r["tokens"] / 1e9:.4g}B tokens':<16}{r['modelled_chip_hours']:,.1f} chip-hours, "
        f"{r['modelled_chip_hours'] / r['chips'] / 24:.1f} days",
        f"  images/s        {r['modelled_images_per_second_per_host']:.1f} for each of {r['hosts']} hosts to feed",
    ]


def verdict(r: Mapping[str, Any]) -> str:
    """The line on whether a program fits, and by how much."""
    peak, hbm = r["peak_bytes_per_chip"], r["hbm_bytes_per_chip"]
    if peak is None:
        return f"DOES NOT FIT in {_gib(hbm)} a chip (the compiler does not report by how much)"
    if r.get("host_bytes_per_chip", 0) >= r.get("host_limit_per_chip", 1):
        return "DOES NOT FIT: offloads more than the chip's share of its host's memory; choose a remat without offload"
    if not r["fits"]:
        over = f"peak {_gib(peak)} of {_gib(hbm)} a chip, {_gib(max(peak - hbm, 0))} too much"
        remedy = "int8, fewer slots or fewer tokens" if "slots" in r else "microbatches or recompute, or try --search"
        return f"DOES NOT FIT: {over}; use more chips, {remedy}"
    free = r.get("free_share", 1 - peak / hbm)
    few = "" if free >= MARGIN else f"; less than {MARGIN:.0%}, which the runtime may need"
    return f"fits: peak {_gib(peak)} of {_gib(hbm)} a chip, {free:.0%} free{few}"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Draw memory by content, and the modelled step by part, as a PNG."""
    path.write_bytes(html.plot(lambda figure: _draw(report, figure), "", height=4.2).png)


def _draw(report: Mapping[str, Any], figure: html.Canvas) -> None:
    parts = {name.replace("_", " "): s for name, s in (report.get("modelled_parts_seconds") or {}).items() if s}
    memory, *others = figure.subplots(1, 2 if parts else 1, squeeze=False)[0]
    left = 0.0
    for i, (name, size) in enumerate(report["memory_bytes_per_chip"].items()):
        memory.barh(0, size / GIB, left=left, color=f"C{i}", label=f"{name} {size / GIB:.2f}")
        left += size / GIB
    hbm, peak = report["hbm_bytes_per_chip"] / GIB, (report["peak_bytes_per_chip"] or 0) / GIB
    memory.axvline(hbm, color="gray", linestyle="--", label=f"HBM {hbm:.2f}")
    memory.axvline(peak, color="red", linestyle=":", label=f"peak {peak:.2f}")
    memory.set(title="memory per chip", xlabel="GiB", yticks=[], ylim=(-0.8, 0.8))
    memory.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)
    for step in others:
        step.bar_label(step.barh(list(parts), list(parts.values()), color="C4"), fmt="%.2f", padding=2)
        seconds, mfu = report["modelled_step_seconds"], report["modelled_mfu"]
        step.set(title=f"modelled step: {seconds:.2f} s, MFU {mfu:.1%}", xlabel="s")
        step.invert_yaxis()
        step.margins(x=0.15)
    words = [report.get("config", ""), *report.get("set", ()), *map(" ".join, report.get("versions", {}).items())]
    title = f"{report['slices']} x {report['topology']}, T = {report['length']:,}\n{shorten(' '.join(words), 140)}"
    figure.suptitle(title, fontsize="medium", parse_math=False)
