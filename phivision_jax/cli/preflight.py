"""``phivision preflight``: memory, collectives and modelled speed of a step on an absent TPU slice."""

from __future__ import annotations

import json as json_library
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from phivision_jax.cli import load_config as loader

if TYPE_CHECKING:
    from phivision_jax.hardware.topology import Topology
    from phivision_jax.training.run_config import ResolvedConfig


prepare = loader.prepare


def preflight(
    config: Annotated[str, arg(metavar="FILE[:VARIANT]")],
    topology: Annotated[str, arg(metavar="SLICE")],
    slices: int = 1,
    generate: bool = False,
    search: bool = False,
    low_effort: bool = False,
    length: int = 4096,
    slots: int | None = None,
    weights: Literal["int8"] | None = None,
    cache: Literal["bfloat16", "int8"] = "bfloat16",
    json: Annotated[Path | None, arg(metavar="FILE")] = None,
    plot: Annotated[Path | None, arg(metavar="FILE")] = None,
    set: Annotated[tuple[str, ...], arg(metavar="FIELD=VALUE")] = (),
) -> None:
    """Compile a training step for a TPU slice, on a machine without a TPU, and report whether it fits.

    The report has the contents of the memory, the collectives and their overlap with computation, and a modelled step
    time (docs/roofline.md explains the model). The command needs Linux x86-64. A full-size step compiles in minutes, or
    with --low-effort in half a minute. The exit code is 3 when the step does not fit.

    Args:
        config: Configuration file, with a variant after a colon: configs/phi4_rv_15b.py:stage2.
            The model is that of init_from; without init_from, the one that the file describes, or the released one.
        topology: TPU slice, by its XLA name (v5p:4x4x8, v5e:16x16, v6e:16x16) or Cloud name (v5p-256, v5e-8, v6e-8;
            v4, v5p and tpu7x count TensorCores, two per chip).
        slices: Number of such slices.
        generate: Compile the programs of generation instead of training; report the most slots that fit, copies of the
            KV cache, bytes that each token reads, and modelled times.
        search: Try several meshes, remat policies and microbatches, and report the fastest that fits. With --json, the
            file has what was tried and the best so far at any time.
        low_effort: Compile quickly; the program overlaps less communication or none, and may need a tenth more or less
            memory.
        length: Tokens of a slot, prompt and answer together, with --generate.
        slots: Sequences at the same time, with --generate; default: the most that fit.
        weights: Form of the weights, with --generate; default: bfloat16.
        cache: Dtype of keys and values, with --generate.
        json: File to which the report is also written, as JSON, with configuration, changes and versions.
        plot: PNG file for a figure of memory and step time; default: next to the file of --json, if there is one.
        set: Change fields of the configuration, as in data.batch_rows=512 remat=full.
    """
    from phivision_jax.checkpoint import loading
    from phivision_jax.hardware.topology import parse_topology
    from phivision_jax.io import atomic
    from phivision_jax.preflight import compiling, step_report
    from phivision_jax.training.device_layout import resolve_for

    if generate and (search or plot):
        raise ValueError("--generate excludes --search and --plot, which are for training steps")
    if plot and plot.suffix != ".png":
        raise ValueError(f"--plot={plot} must be a PNG file: give a name that ends in .png")
    where = parse_topology(topology, slices)
    given = loader.load_config(config, set)
    if given.init_from:
        checkpoint = loading.locate(given.init_from)
        given = given.with_checkpoint(loading.config_of(checkpoint), str(checkpoint))
    cfg = resolve_for(given, where.chip.device_kind, where.devices, where.slices)
    compiling.check_machine()
    print(where)
    versions = {package: version(package) for package in ("phivision_jax", "jax", "libtpu")}
    figure = None if generate else plot or (json and json.with_suffix(".png"))
    for path in filter(None, (json, figure)):
        path.parent.mkdir(parents=True, exist_ok=True)
    given_as = {"config": config, "stage": given.data.stage, "set": list(set), "versions": versions}

    def record(found: dict[str, Any]) -> None:
        if json is not None:
            atomic.write(json, json_library.dumps(given_as | found, indent=1) + "\n", durable=False)

    if generate:
        found = _generate(cfg, where, low_effort, (length, slots, weights, cache))
    else:
        found = _search(cfg, where, record) if search else _train(cfg, where, low_effort)
        print(step_report.text(found))
    record(found)
    if figure:
        step_report.plot(given_as | found, figure)
    print("", *(f"wrote {path}" for path in (json, figure) if path), sep="\n")
    if not found["fits"]:
        raise SystemExit(3)


def _train(cfg: ResolvedConfig, where: Topology, low_effort: bool) -> dict[str, Any]:
    from phivision_jax.preflight import compiling, step_report

    title = f"compiling at {'low' if low_effort else 'default'} effort"
    facts = compiling.run_worker(title, compiling.train_facts, cfg, where, low_effort)
    return step_report.summary(cfg, where, facts, low_effort)


def _search(cfg: ResolvedConfig, where: Topology, record: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    from phivision_jax.preflight.model.layout_search import candidates, search
    from phivision_jax.preflight.step_report import MARGIN

    most = 2 * sum(map(len, candidates(cfg, where)))  # each at low and at default effort
    tried, reports = list[str](), list[dict[str, Any]]()

    def attempt(one: ResolvedConfig, low_effort: bool) -> dict[str, Any]:
        reports.append(_train(one, where, low_effort))
        return reports[-1]

    def log(line: str) -> None:
        tried.append(line)
        fitting = (report for report in reports if report.get("free_share", 0) >= MARGIN)
        best = min(fitting, key=lambda report: report["modelled_step_seconds"], default={})
        print(f"{len(tried)} of at most {most}: {line}" + (f"; best so far: {_flags(best)}" if best else ""))
        record({"fits": False} | best | {"tried": tried})

    found = search(cfg, where, attempt, log, MARGIN)
    if found is None:
        raise ValueError(f"no layout that was tried fits {where}; use more chips or shorter rows")
    print(f"best: {_flags(found)}\n")
    return found | {"tried": tried}


def _flags(report: Mapping[str, Any]) -> str:
    best = {f"mesh.{axis}": report["mesh"][axis] for axis in ("fsdp", "data", "context")}
    best |= {name: report[name] for name in ("remat", "vision_remat", "microbatches")}
    return " ".join(f"--config.{name}={value}" for name, value in best.items())


def _generate(
    cfg: ResolvedConfig, where: Topology, low_effort: bool, sizes: tuple[int, int | None, str | None, str]
) -> dict[str, Any]:
    from phivision_jax.preflight import compiling, generation

    if where.slices > 1:
        raise ValueError("--generate takes one slice: further slices are replicas of it")

    def attempt(planned: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        facts = dict[str, dict[str, Any]]()
        for program in ("admit", "decode"):
            title = f"compiling {program} for {planned['slots']:,} slots"
            facts[program] = compiling.run_worker(
                title, compiling.generate_facts, cfg, where, planned, program, low_effort
            )
            if not facts[program]["fits"]:
                break
        return facts

    chosen = generation.plan(cfg, where, *sizes)
    found = (generation.largest if sizes[1] is None else generation.checked)(chosen, where, attempt)
    try:
        found |= generation.times(cfg, where, found) if found["fits"] else {}
    except ValueError as error:
        found["not_modelled"] = str(error)
    print(generation.text(found))
    return found
