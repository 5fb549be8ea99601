"""``phivision preflight``: memory, collectives and modelled speed of a step on an absent TPU slice."""

from __future__ import annotations

import json as json_library
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    prompt: int = 4096,
    new_tokens: int = 1024,
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
        topology: TPU slice, by its XLA name (v5p:4x4x8, v5e:16x16, v6e:16x16) or Cloud name (v5p-256, v5litepod-256).
        slices: Number of such slices.
        generate: Compile generation instead of training; report weights, KV cache, largest batch and time per token.
        search: Try several meshes, remat policies and microbatches, and report the fastest that fits.
        low_effort: Compile quickly; the program needs a little more memory and overlaps no communication.
        prompt: Length of a prompt in tokens, image included, with --generate.
        new_tokens: Length of an answer in tokens, with --generate.
        json: File to which the report is also written, as JSON.
        plot: PNG file for a figure of memory and step time; default: next to the file of --json, if there is one.
        set: Change fields of the configuration, as in data.batch_rows=512 remat=full.
    """
    from phivision_jax.checkpoint import loading
    from phivision_jax.hardware.topology import parse_topology
    from phivision_jax.preflight import compiling, step_report
    from phivision_jax.training.device_layout import resolve_for

    if generate and search:
        raise ValueError("--generate and --search exclude each other: the search is for training steps")
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
    if generate:
        found = _generate(cfg, where, prompt, new_tokens)
    else:
        found = _search(cfg, where) if search else _train(cfg, where, low_effort)
        print(step_report.text(found))
    if json is not None:
        json.parent.mkdir(parents=True, exist_ok=True)
        json.write_text(json_library.dumps(found, indent=1) + "\n")
        print(f"\nwrote {json}")
    figure = plot or (json and json.with_suffix(".png"))
    if figure and not generate:
        step_report.plot(found, figure)
        print(f"wrote {figure}")
    if not found["fits"]:
        raise SystemExit(3)


def _train(cfg: ResolvedConfig, where: Topology, low_effort: bool) -> dict[str, Any]:
    from phivision_jax.preflight import compiling, step_report

    title = f"compiling at {'low' if low_effort else 'default'} effort"
    facts = compiling.run_worker(title, compiling.train_facts, cfg, where, low_effort)
    return step_report.summary(cfg, where, facts, low_effort)


def _search(cfg: ResolvedConfig, where: Topology) -> dict[str, Any]:
    from phivision_jax.preflight.model.layout_search import search
    from phivision_jax.preflight.step_report import MARGIN

    found = search(cfg, where, lambda tried, low: _train(tried, where, low), print, MARGIN)
    if found is None:
        raise ValueError(f"no layout that was tried fits {where}; use more chips or shorter rows")
    best = {f"mesh.{axis}": found["mesh"][axis] for axis in ("fsdp", "data", "context")}
    best |= {name: found[name] for name in ("remat", "vision_remat", "microbatches")}
    print("best: " + " ".join(f"--config.{name}={value}" for name, value in best.items()) + "\n")
    return found


def _generate(cfg: ResolvedConfig, where: Topology, prompt: int, new_tokens: int) -> dict[str, Any]:
    from phivision_jax.preflight import compiling, generation

    if where.slices > 1:
        raise ValueError("--generate takes one slice: further slices are replicas of it")

    def attempt(planned: Mapping[str, Any]) -> dict[str, Any]:
        title = f"compiling for {planned['batch_rows']:,} prompts"
        return compiling.run_worker(title, compiling.generate_facts, cfg, where, planned)

    found = generation.confirm(generation.plan(cfg, where, prompt, new_tokens), where, attempt)
    try:
        found |= generation.times(cfg, where, found)
    except ValueError as error:
        found["not_modelled"] = str(error)
    print(generation.text(found))
    return found
