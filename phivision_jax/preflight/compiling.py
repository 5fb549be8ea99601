"""Compile programs for absent TPU slices, each in a process of its own, and collect their facts.

The TPU compiler may abort the process that it runs in, and takes gigabytes.
"""

import dataclasses
import gc
import importlib.util
import math
import multiprocessing
import os
import platform
import signal
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
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
from phivision_jax.inference.engine import Engine
from phivision_jax.inference.local import CHUNK, IMAGE_BYTES
from phivision_jax.io.messages import shorten
from phivision_jax.io.progress import bar
from phivision_jax.models import phivision
from phivision_jax.preflight import hlo, memory, traffic
from phivision_jax.preflight.collectives import axes_of, collectives, wire_bytes
from phivision_jax.preflight.matmuls import matmul_flops
from phivision_jax.training.run_config import ResolvedConfig
from phivision_jax.training.step import make_train_step

# Without these the compiler waits for a metadata server, and two compilations at once fail on a lock file.
ENVIRONMENT = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"}

PHASES = 3
"""Tracing, compiling, and reading the program."""

type Advance = Callable[[], None]
"""Called when a phase ends."""


def check_machine() -> None:
    """Check that the TPU compiler runs on this machine.

    Raises:
      ValueError: when it does not, or is not installed.
    """
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise ValueError(
            f"the TPU compiler (libtpu) runs on Linux x86-64 only, and this is {platform.system()} on "
            f"{platform.machine()}; run preflight on a Linux machine, no TPU needed"
        )
    for package in ("libtpu", "tokamax"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"{package} is not installed: pip install 'phivision_jax[tpu]'")


def run_worker(title: str, facts_of: Callable[..., dict[str, Any]], *arguments: Any, shown: bool = True) -> dict:
    """Call ``train_facts`` or ``generate_facts`` in a new process and return its facts.

    Args:
      title: text beside the progress bar.
      facts_of: the function; it receives an ``Advance``, then ``arguments``.

    Raises:
      ValueError: when the program cannot be compiled; the message gives the reason, or the compiler's last line.
    """
    os.environ.update(ENVIRONMENT)  # the new process inherits them
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile("r", errors="replace") as log, bar(title, PHASES, shown=shown) as advance:
        process = context.Process(target=_send_facts, args=(sender, log.name, facts_of, arguments))
        process.start()
        sender.close()
        try:
            while (found := receiver.recv()) is None:
                advance(1)
            advance(1)
        except EOFError:
            process.join()
            raise ValueError(f"{title}: {_failure(process.exitcode or 0, log.read())}") from None
        finally:
            process.kill()
            process.join()
    if isinstance(found, ValueError):
        raise found
    return found


def _send_facts(sender: Connection, log: str, facts_of: Callable[..., dict[str, Any]], arguments: tuple) -> None:
    gc.disable()  # tracing makes millions of small objects, nearly all of which stay
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), stream)
    try:
        sender.send(facts_of(lambda: sender.send(None), *arguments))
    except ValueError as error:
        sender.send(ValueError(str(error)))  # subclasses may not pickle


def _failure(code: int, log: str) -> str:
    lines = [line for line in log.splitlines() if line.strip()]
    checks = [line for line in lines if "Check failed" in line or line.startswith("jax.errors.")]
    ended = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with code {code}"
    return f"the compiler {ended}: " + shorten((checks or lines or ["no output"])[-1].strip(), 160)


def train_facts(advance: Advance, cfg: ResolvedConfig, where: Topology, low_effort: bool) -> dict[str, Any]:
    """Compile a training step.

    Returns:
      ``mesh``, ``fits``, ``compile_seconds``, and bytes per device: ``memory``, ``buffers`` and ``peak_bytes``, of a
      program that does not fit those that it needs, or None where the compiler does not report them. Of a program
      that fits also ``matmul_flops`` per device, and ``collectives``.
    """
    mesh = sharding.make_mesh(dataclasses.asdict(cfg.mesh), devices_of(where))
    step = make_train_step(cfg, mesh, steps=1_000)
    batch = batch_spec(cfg.data.batch_rows, cfg.data.row_shape(cfg.model), cfg.model.vision.patch_dim)
    placed, state = sharding.abstract(batch, step.batch_shardings(batch)), step.abstract_state
    arguments = {"parameters": state["params"], "optimizer": state["opt_state"], "batch": placed}
    options = compiler_options(mesh) | (LOW_EFFORT if low_effort else {})
    facts, module = _compile(advance, step.lower(batch), arguments, options)
    facts |= {"mesh": dict(mesh.shape), "checkpoint_bytes": _bytes(state)}
    if module is None:
        return facts
    found = [
        {name: getattr(one, name) for name in ("kind", "name", "result_bytes", "times", "overlapped")}
        | {"wire_bytes": wire_bytes(one) * one.times, "axes": axes_of(one, mesh.shape)}
        for one in collectives(module)
    ]
    return facts | {"matmul_flops": matmul_flops(module), "collectives": found}


def generate_facts(
    advance: Advance, cfg: ResolvedConfig, where: Topology, plan: Mapping[str, Any], program: str, low_effort: bool
) -> dict[str, Any]:
    """Compile a program of the engine in its largest shape.

    Args:
      plan: ``mesh``, ``slots``, ``length``, ``weights`` and ``cache`` (``generation.plan``).
      program: "admit", which prefills, or "decode".

    Returns:
      ``fits``, ``compile_seconds``, ``memory``, ``buffers`` and ``peak_bytes``, as in ``train_facts``. Of a program
      that fits also ``temporary_bytes``; of "decode" ``moved_bytes`` and ``wire_bytes`` per token of each slot, and
      ``copies``, the instructions that write as much as the keys of a layer of the cache.
    """
    mesh = sharding.make_mesh(plan["mesh"], devices_of(where)[: math.prod(plan["mesh"].values())])
    graphdef, params = phivision.abstract(cfg.model, dtype=jnp.bfloat16, weights=plan["weights"])
    with sharding.override_rules(cfg.rules), sharding.generation_rules(cfg.model, mesh):
        placed = sharding.abstract(nnx.to_pure_dict(params), sharding.param_shardings(params, mesh), jnp.bfloat16)
    engine = Engine(
        phivision.merge(graphdef, placed),
        slots=plan["slots"],
        length=plan["length"],
        chunk=CHUNK,
        pool=IMAGE_BYTES // (cfg.model.decoder.hidden_size * 2),
        cache_dtype=jnp.dtype(plan["cache"]),
        stop_ids=cfg.model.decoder.stop_ids,
    )
    shape = [shape for shape in engine.shapes() if shape.program == program][-1]
    lowered = engine.lower(shape, engine.example_arguments(shape))
    cache, *rest = engine.state
    arguments = {"weights": engine.weights, "cache": cache, "vision tokens": rest}
    # Of "admit" only the memory is of interest, for which low effort gives an upper bound.
    options = LOW_EFFORT if low_effort or program == "admit" else {}
    facts, module = _compile(advance, lowered, arguments, options)
    if module is None or program == "admit":  # how often its loops run depends on the prompts
        return facts
    layer = _bytes(cache.k, per_device=True) // cfg.model.decoder.num_layers
    return facts | {
        "moved_bytes": traffic.moved_bytes(module) / engine.steps,
        "wire_bytes": sum(wire_bytes(one) * one.times for one in collectives(module)) / engine.steps,
        "copies": traffic.large_results(module, layer),
    }


def devices_of(where: Topology) -> Sequence[Any]:
    """Descriptions of the devices of absent slices, as JAX shows them on the slices themselves."""
    # v4: the two cores of a chip are one device on a slice ("megacore"), but two by default here.
    config = {"chip_config_name": "megacore"} if where.generation == "v4" else {}
    return topologies.get_topology_desc(where.xla_name, "tpu", num_slices=where.slices, **config).devices


def _bytes(tree: Any, per_device: bool = False) -> int:
    shapes = [(x, x.sharding.shard_shape(x.shape) if per_device else x.shape) for x in jax.tree.leaves(tree)]
    return sum(math.prod(shape) * x.dtype.itemsize for x, shape in shapes)


def _compile(
    advance: Advance, lowered: Any, arguments: Mapping[str, Any], options: dict[str, Any]
) -> tuple[dict[str, Any], hlo.Module | None]:
    """Facts of a program, and its instructions; None when it does not fit.

    Args:
      arguments: the program's arguments by name, with their shardings.
    """
    advance()
    facts: dict[str, Any] = {"memory": {name: _bytes(tree, per_device=True) for name, tree in arguments.items()}}
    with tempfile.TemporaryDirectory() as tables:
        start = time.monotonic()
        try:
            compiled, failure = lowered.compile(compiler_options=options | memory.dump_options(Path(tables))), ""
        except jax.errors.JaxRuntimeError as error:
            compiled, failure = None, str(error)
            if "RESOURCE_EXHAUSTED" not in failure:
                raise
        facts |= {"compile_seconds": time.monotonic() - start, "fits": compiled is not None}
        if compiled is None:
            return facts | {"peak_bytes": memory.needed(failure), "buffers": memory.allocations(failure)[:12]}, None
        advance()
        module = hlo.parse(compiled.as_text())
        buffers = memory.peak_buffers(*memory.dumped(Path(tables), module.name), memory.op_names(module))
    sums = compiled.memory_analysis()
    facts["temporary_bytes"] = sums.temp_size_in_bytes
    held = sums.argument_size_in_bytes + sums.output_size_in_bytes - sums.alias_size_in_bytes
    on_device = held + sums.temp_size_in_bytes + sums.generated_code_size_in_bytes
    # The peak includes what is offloaded to the host; the device never holds more than its own sums.
    peak = min(sums.peak_memory_in_bytes, on_device)
    return facts | {"peak_bytes": peak, "host_bytes": sums.host_temp_size_in_bytes, "buffers": buffers[:12]}, module
