"""``phivision preflight``: does a training or generation fit a TPU slice that is not here, and how fast is it."""

from __future__ import annotations

import dataclasses
import json as json_library
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

if TYPE_CHECKING:
    from phivision_jax.hardware.topology import Topology
    from phivision_jax.training.run_config import RunConfig


def preflight(
    config: str,
    topology: str,
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
    """Compile for TPUs that are not here: does it fit, which collectives, how long would a step take (modelled).

    Runs on Linux x86-64 without a TPU; a full step takes minutes, with --low-effort half of one. Every figure of speed
    is modelled (docs/roofline.md). Exits with 3 when the step does not fit.

    Args:
        config: A configuration file, and its variant after a colon: configs/phi4_rv_15b.py:stage2.
        topology: The slice, by XLA's name (v5p:4x4x8, v5e:16x16, v6e:16x16) or Cloud's (v5p-256, v5litepod-256).
        slices: Slices of that shape.
        generate: Generation instead of training: weights, KV cache, largest batch, prefill, time per token.
        search: Try other groups, remat policies and microbatches, and confirm the fastest that fits.
        low_effort: Compile at low effort: quick, with a little more memory and nothing overlapped.
        prompt: With --generate: tokens of a prompt, image included.
        new_tokens: With --generate: tokens of an answer.
        json: Also write everything to this file.
        plot: Where the figure goes; default: beside the JSON file, if there is one.
        set: Change fields of the configuration: data.batch_rows=512 remat=full.
    """
    from phivision_jax.cli.load_config import load_config
    from phivision_jax.hardware.topology import parse_topology
    from phivision_jax.preflight import report
    from phivision_jax.preflight.compiling import check_machine

    if sum((generate, search)) > 1:
        raise ValueError("--generate and --search exclude each other: the search is for training steps")
    where, cfg = parse_topology(topology, slices), load_config(config, set)
    check_machine()
    print(where)
    if generate:
        found = _generate(cfg, where, prompt, new_tokens)
    elif search:
        found = _search(cfg, where)
    else:
        found = _train(cfg, where, low_effort)
    if not generate:
        print(report.text(found, where).split("\n", 1)[1])
    if json is not None:
        json.parent.mkdir(parents=True, exist_ok=True)
        json.write_text(json_library.dumps(found, indent=1) + "\n")
        print(f"\nwrote {json}")
    picture = plot or (json.with_suffix(".png") if json is not None else None)
    if picture is not None and not generate:
        report.plot(found, picture)
        print(f"wrote {picture}")
    if not found["fits"]:
        raise SystemExit(3)


def _train(cfg: RunConfig, where: Topology, low_effort: bool, title: str = "compiling") -> dict[str, Any]:
    from phivision_jax.preflight import report
    from phivision_jax.preflight.compiling import compile_facts
    from phivision_jax.training.run_config import RunConfig

    facts = compile_facts(
        {
            "what": "train",
            "config": dataclasses.asdict(cfg),
            "topology": where.xla_name,
            "slices": where.slices,
            "low_effort": low_effort,
        },
        f"{title} at {'low' if low_effort else 'default'} effort",
    )
    return report.summary(RunConfig.from_dict(facts["config"]), where, facts, low_effort)


def _search(cfg: RunConfig, where: Topology) -> dict[str, Any]:
    from phivision_jax.preflight.model.layout_search import search
    from phivision_jax.training.device_layout import resolve_for

    resolved = resolve_for(cfg, where.device_kind, where.devices, where.slices)
    found = search(resolved, where, lambda tried, low: _train(tried, where, low, "trying"), print)
    if found is None:
        raise ValueError(f"nothing that was tried fits {where}; use more chips or shorter rows")
    mesh = found["mesh"]
    print(
        f"best: --config.mesh.fsdp={mesh['fsdp']} --config.mesh.data={mesh['data']} "
        f"--config.mesh.context={mesh['context']} --config.remat={found['remat']} "
        f"--config.vision_remat={found['vision_remat']} "
        f"--config.microbatches={found['microbatches']}\n"
    )
    return found


def _generate(cfg: RunConfig, where: Topology, prompt: int, new_tokens: int) -> dict[str, Any]:
    from phivision_jax.preflight import generation
    from phivision_jax.preflight.compiling import compile_facts

    if where.slices > 1:
        raise ValueError("--generate is about one slice: several are so many copies of it")

    def attempt(planned: Mapping[str, Any]) -> dict[str, Any]:
        request = {"what": "generate", "config": dataclasses.asdict(cfg)}
        request |= {name: planned[name] for name in ("topology", "mesh", "batch_rows", "prompt", "new_tokens")}
        return compile_facts(request, f"compiling for {planned['batch_rows']:,} prompts")

    found = generation.confirm(generation.plan(cfg, where, prompt, new_tokens), where, attempt)
    try:
        found |= generation.times(cfg, where, found)
    except ValueError as error:
        found["not_modelled"] = str(error)
    print(generation.text(found))
    return found
