"""One compilation for chips that are not here, in a process of its own: the compiler may abort, and takes gigabytes.

    python -m phivision_jax.preflight.worker FACTS.json < request.json

The request names one of the two functions here (``what``: "train" or "generate") and holds its arguments. While it
works, the process says on stdout what it is doing, a line at a time; what the function returns is written as JSON.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from phivision_jax.hardware.topology import parse_topology

PHASES = ("tracing", "compiling", "reading the program")


def train_facts(config: dict[str, Any], topology: str, slices: int, low_effort: bool) -> dict[str, Any]:
    """Compile a training step and say what the compiler made of it.

    Returns:
      JSON values: ``config`` with nothing left open, ``fits``, ``compile_seconds``, and bytes per device (``memory``,
      ``buffers``); of a program that fits also ``matmul_flops`` per device, and ``collectives``.
    """
    import jax
    from jax.experimental import topologies

    from phivision_jax import sharding
    from phivision_jax.batch import batch_spec
    from phivision_jax.hardware.compiler_options import LOW_EFFORT, compiler_options
    from phivision_jax.preflight.memory import dump_options
    from phivision_jax.training import device_layout
    from phivision_jax.training.run_config import RunConfig
    from phivision_jax.training.step import make_train_step

    _say(0)
    where = parse_topology(topology, slices)
    devices = topologies.get_topology_desc(
        platform="tpu", topology_name=where.xla_name, **({"num_slices": slices} if slices > 1 else {})
    ).devices
    cfg = device_layout.resolve(RunConfig.from_dict(config), devices)
    mesh = sharding.make_mesh(dataclasses.asdict(cfg.mesh), devices)
    step = make_train_step(cfg, mesh, steps=1_000)
    batch = batch_spec(cfg.data.batch_rows, cfg.data.row_shape(cfg.model), cfg.model.vision.patch_dim)
    lowered = step.lower(batch)
    batch = sharding.abstract(batch, step.batch_shardings(batch))
    held = {
        "parameters": _bytes_here(step.abstract_state["params"]),
        "optimizer": _bytes_here(step.abstract_state["opt_state"]),
        "batch": _bytes_here(batch),
    }
    facts: dict[str, Any] = {
        "config": dataclasses.asdict(cfg),
        "mesh": {name: int(size) for name, size in mesh.shape.items()},
        "checkpoint_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(step.abstract_state)),
        "memory": held,
    }
    options: dict[str, Any] = compiler_options(mesh) | (LOW_EFFORT if low_effort else {})
    with tempfile.TemporaryDirectory() as tables:
        options |= dump_options(Path(tables))
        found = _compile(lowered, sum(held.values()), options, Path(tables), "jit_step")
    hlo = found.pop("hlo", None)
    return facts | found | (_work(hlo, facts["mesh"]) if hlo else {})


def generate_facts(
    config: dict[str, Any], topology: str, mesh: dict[str, int], batch_rows: int, prompt: int, new_tokens: int
) -> dict[str, Any]:
    """Compile prefill and decoding of ``batch_rows`` prompts, weights in bf16."""
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from jax.experimental import topologies

    from phivision_jax import sharding
    from phivision_jax.batch import batch_spec
    from phivision_jax.hardware.compiler_options import LOW_EFFORT
    from phivision_jax.inference.generate import generate_tokens
    from phivision_jax.models import phivision
    from phivision_jax.preflight.memory import dump_options
    from phivision_jax.rows import row_shape
    from phivision_jax.training.run_config import RunConfig

    _say(0)
    where, cfg = parse_topology(topology), RunConfig.from_dict(config)
    devices = topologies.get_topology_desc(platform="tpu", topology_name=where.xla_name).devices
    placed = sharding.make_mesh(mesh, devices)
    graphdef, state = phivision.abstract(cfg.model, dtype=jnp.bfloat16)
    with sharding.override_rules(cfg.rules):
        at = sharding.param_shardings(state, placed)
    params = sharding.abstract(nnx.to_pure_dict(state), at, jnp.bfloat16)
    shape = row_shape(cfg.model, prompt, num_patches=min(cfg.model.max_patches, prompt))
    spec = batch_spec(batch_rows, shape, cfg.model.vision.patch_dim)
    rows = sharding.row_sharding(placed)
    spec = sharding.abstract(spec, rows)
    key = jax.eval_shape(lambda: jax.random.key(0))
    with jax.set_mesh(placed), sharding.override_rules(cfg.rules):
        lowered = generate_tokens.lower(graphdef, params, spec, key, new_tokens, -1, 0.0, 1.0)
    held = {"parameters": _bytes_here(params), "batch": _bytes_here(spec)}
    facts = {"memory": held, "mesh": {name: int(size) for name, size in placed.shape.items()}}
    with tempfile.TemporaryDirectory() as tables:
        options = LOW_EFFORT | dump_options(Path(tables))
        module = "jit_generate_tokens"
        found = _compile(lowered, sum(held.values()), options, Path(tables), module)
    found.pop("hlo", None)  # how often the loop over tokens runs is data
    return facts | found


def _compile(lowered: Any, held_bytes: int, options: dict[str, Any], tables: Path, module: str) -> dict[str, Any]:
    import jax

    from phivision_jax.preflight import memory

    _say(1)
    began = time.monotonic()
    try:
        compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if "RESOURCE_EXHAUSTED" not in text:
            raise
        buffers = sorted(memory.allocations(text), reverse=True)
        return {
            "fits": False,
            "compile_seconds": time.monotonic() - began,
            "needed_bytes": memory.needed(text, held_bytes),
            "buffers": buffers[:12],
        }
    seconds = time.monotonic() - began
    _say(2)
    sums = compiled.memory_analysis()
    held = sums.argument_size_in_bytes + sums.output_size_in_bytes - sums.alias_size_in_bytes
    on_device = held + sums.temp_size_in_bytes + sums.generated_code_size_in_bytes
    return {
        "fits": True,
        "compile_seconds": seconds,
        # The peak counts what is offloaded to the host too; the device never holds more than the sums of its own.
        "peak_bytes": min(sums.peak_memory_in_bytes, on_device),
        "host_bytes": sums.host_temp_size_in_bytes,
        "buffers": [(b.bytes, b.what) for b in memory.peak_buffers(*memory.dumped(tables, module))[:12]],
        "hlo": compiled.as_text(),
    }


def _work(text: str, mesh: dict[str, int]) -> dict[str, Any]:
    """Products and collectives of a program whose loops all have a constant number of trips, as in a training step."""
    from phivision_jax.preflight import hlo
    from phivision_jax.preflight.collectives import axes_of, collectives, wire_bytes
    from phivision_jax.preflight.matmuls import matmul_flops

    module = hlo.parse(text)
    found = [
        {name: getattr(one, name) for name in ("kind", "name", "result_bytes", "times", "overlapped")}
        | {"wire_bytes": wire_bytes(one) * one.times, "axes": axes_of(one, mesh)}
        for one in collectives(module)
    ]
    return {"matmul_flops": matmul_flops(module), "collectives": found}


def _bytes_here(tree: Any) -> int:
    """Bytes of these arrays on one device."""
    import jax

    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _say(phase: int) -> None:
    print(PHASES[phase], flush=True)


def main() -> None:
    gc.disable()  # tracing makes millions of small objects, nearly all of which stay
    request = json.load(sys.stdin)
    make: Callable[..., dict[str, Any]] = train_facts if request.pop("what") == "train" else generate_facts
    try:
        facts = make(**request)
    except ValueError as error:
        facts = {"error": str(error)}
    Path(sys.argv[1]).write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
