"""Facts of a program compiled for an absent TPU slice. ``compiling.py`` runs these functions in a separate process."""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies

from phivision_jax import sharding
from phivision_jax.batch import batch_spec
from phivision_jax.hardware.compiler_options import LOW_EFFORT, compiler_options
from phivision_jax.hardware.topology import Topology
from phivision_jax.inference.generate import generate_tokens
from phivision_jax.models import phivision
from phivision_jax.preflight import hlo, memory
from phivision_jax.preflight.collectives import axes_of, collectives, wire_bytes
from phivision_jax.preflight.matmuls import matmul_flops
from phivision_jax.rows import row_shape
from phivision_jax.training.run_config import ResolvedConfig
from phivision_jax.training.step import make_train_step

PHASES = ("tracing", "compiling", "reading the program")

type Report = Callable[[str], None]
"""Receives each phase as it begins."""


def train_facts(report: Report, cfg: ResolvedConfig, where: Topology, low_effort: bool) -> dict[str, Any]:
    """Compile a training step.

    Returns:
      ``mesh``, ``fits``, ``compile_seconds``, and bytes per device (``memory``,
      ``buffers``); of a program that fits also ``matmul_flops`` per device, and ``collectives``.
    """
    report(PHASES[0])
    devices = _devices(where)
    mesh = sharding.make_mesh(dataclasses.asdict(cfg.mesh), devices)
    step = make_train_step(cfg, mesh, steps=1_000)
    batch = batch_spec(cfg.data.batch_rows, cfg.data.row_shape(cfg.model), cfg.model.vision.patch_dim)
    arguments = {
        "parameters": step.abstract_state["params"],
        "optimizer": step.abstract_state["opt_state"],
        "batch": sharding.abstract(batch, step.batch_shardings(batch)),
    }
    options = compiler_options(mesh) | (LOW_EFFORT if low_effort else {})
    facts, module = _compile(report, step.lower(batch), arguments, options)
    facts |= {"mesh": dict(mesh.shape), "checkpoint_bytes": _bytes(step.abstract_state)}
    if module is None:
        return facts
    found = [
        {name: getattr(one, name) for name in ("kind", "name", "result_bytes", "times", "overlapped")}
        | {"wire_bytes": wire_bytes(one) * one.times, "axes": axes_of(one, mesh.shape)}
        for one in collectives(module)
    ]
    return facts | {"matmul_flops": matmul_flops(module), "collectives": found}


def generate_facts(report: Report, cfg: ResolvedConfig, where: Topology, planned: Mapping[str, Any]) -> dict[str, Any]:
    """Compile prefill and decoding of a batch of prompts, weights in bf16.

    Args:
      planned: ``mesh``, ``batch_rows``, ``prompt`` and ``new_tokens`` (``generation.plan``).

    Returns:
      ``fits``, ``compile_seconds``, ``memory`` and ``buffers``, as in ``train_facts``. Products and collectives are not
      counted: the number of new tokens, and so of trips, depends on the data.
    """
    report(PHASES[0])
    mesh = sharding.make_mesh(planned["mesh"], _devices(where))
    graphdef, state = phivision.abstract(cfg.model, dtype=jnp.bfloat16)
    shape = row_shape(cfg.model, planned["prompt"], num_patches=min(cfg.model.max_patches, planned["prompt"]))
    batch = batch_spec(planned["batch_rows"], shape, cfg.model.vision.patch_dim)
    batch = sharding.abstract(batch, sharding.row_sharding(mesh))
    key = jax.eval_shape(lambda: jax.random.key(0))
    with jax.set_mesh(mesh), sharding.override_rules(cfg.rules):
        params = sharding.abstract(nnx.to_pure_dict(state), sharding.param_shardings(state, mesh), jnp.bfloat16)
        lowered = generate_tokens.lower(graphdef, params, batch, key, planned["new_tokens"], -1, 0.0, 1.0)
    facts, _ = _compile(report, lowered, {"parameters": params, "batch": batch}, LOW_EFFORT)
    return facts


def _devices(where: Topology) -> Sequence[Any]:
    return topologies.get_topology_desc(platform="tpu", topology_name=where.xla_name, num_slices=where.slices).devices


def _bytes(tree: Any, per_device: bool = False) -> int:
    shapes = [(x, x.sharding.shard_shape(x.shape) if per_device else x.shape) for x in jax.tree.leaves(tree)]
    return sum(math.prod(shape) * x.dtype.itemsize for x, shape in shapes)


def _compile(
    report: Report, lowered: Any, arguments: Mapping[str, Any], options: dict[str, Any]
) -> tuple[dict[str, Any], hlo.Module | None]:
    """Facts of a program, and its instructions; None when it does not fit.

    Args:
      arguments: the program's arguments by name, with their shardings.
    """
    report(PHASES[1])
    sizes = {name: _bytes(tree, per_device=True) for name, tree in arguments.items()}
    with tempfile.TemporaryDirectory() as tables:
        start = time.monotonic()
        try:
            compiled = lowered.compile(compiler_options=options | memory.dump_options(Path(tables)))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            compiled, message = None, str(error)
        seconds = time.monotonic() - start
        if compiled is None:
            facts = {"fits": False, "needed_bytes": memory.needed(message, sum(sizes.values()))}
            module, buffers = None, memory.allocations(message)
        else:
            report(PHASES[2])
            sums = compiled.memory_analysis()
            held = sums.argument_size_in_bytes + sums.output_size_in_bytes - sums.alias_size_in_bytes
            on_device = held + sums.temp_size_in_bytes + sums.generated_code_size_in_bytes
            facts = {
                "fits": True,
                # The peak includes what is offloaded to the host; the device never holds more than its own sums.
                "peak_bytes": min(sums.peak_memory_in_bytes, on_device),
                "host_bytes": sums.host_temp_size_in_bytes,
            }
            module = hlo.parse(compiled.as_text())
            buffers = memory.peak_buffers(*memory.dumped(Path(tables), module.name), memory.op_names(module))
    return facts | {"compile_seconds": seconds, "memory": sizes, "buffers": buffers[:12]}, module
