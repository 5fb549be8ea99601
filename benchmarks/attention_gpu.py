"""One attention layer on an H100, forward and backward: kernels, blocks without kernels, and all scores at once.

    pip install -e '.[cuda]'
    python benchmarks/attention_gpu.py --out docs/results/attention_gpu.json

Without a GPU each form is only compiled, for the chip described below, and its memory printed (Linux x86-64). With a
GPU, each form that fits is also compared with blocks in fp32, and timed in turns. ``python -m benchmarks.preflight
--tables`` writes the table of docs/preflight.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # the plugin requires a driver, which compiling does not need

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.experimental import topologies
from jax.extend import backend as jax_backend
from jax.sharding import NamedSharding, PartitionSpec

from phivision_jax import sharding
from phivision_jax.config import ModelConfig
from phivision_jax.models.attention import attend
from phivision_jax.models.attention.blockwise import plain

MIB = 2**20
TURNS = 7

# The CUDA compiler's description of a chip (XLA's GpuTargetConfigProto): an H100 SXM with 80 GB.
H100_MIB = 81_008
H100 = f"""
gpu_device_info {{
  cuda_compute_capability {{ major: 9 }}
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: {H100_MIB * MIB}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclasses.dataclass(frozen=True)
class Tower:
    heads: int
    kv_heads: int
    head_dim: int
    lengths: tuple[int, ...]
    spans: bool
    """Queries have a last key; otherwise they see all of their segment."""


RELEASED = ModelConfig()
TOWERS = {
    "decoder": Tower(
        RELEASED.decoder.num_heads, RELEASED.decoder.num_kv_heads, RELEASED.decoder.head_dim, (8192, 16_384), True
    ),
    "vision": Tower(RELEASED.vision.num_heads, RELEASED.vision.num_heads, RELEASED.vision.head_dim, (8192,), False),
}
FORMS = {"kernels": "gpu", "blocks": "xla", "plain": None}


@dataclasses.dataclass
class Row:
    tower: str
    length: int
    form: str
    temp_mib: float
    """Temporaries of forward and backward, of one row."""
    kernels: int
    """Kernels of tokamax in the program."""
    error: float | None = None
    """Largest difference from fp32 of the loss and of each gradient, over the largest value of each."""
    milliseconds: float | None = None
    """Forward and backward, the median of the turns."""


def loss(tower: Tower, form: str) -> Callable[..., jax.Array]:
    def masked_loss(
        q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, span_end: jax.Array, weight: jax.Array
    ) -> jax.Array:
        if FORMS[form] is None:
            last = span_end if tower.spans else jnp.full_like(span_end, q.shape[1])
            out = plain(q, k, v, segments, segments, last)
        else:
            with attend.backend(FORMS[form]):
                out = attend.attend(q, k, v, segment_ids=segments, span_end=span_end if tower.spans else None)
        real = (segments > 0)[..., None, None]
        return (jnp.where(real, out, 0).astype(jnp.float32) * weight.astype(jnp.float32)).sum()

    return masked_loss


def inputs(tower: Tower, length: int) -> list[np.ndarray]:
    """Four examples, an image in each, and padding."""
    rng = np.random.default_rng(0)
    heads = tower.heads, tower.kv_heads, tower.kv_heads, tower.heads
    q, k, v, weight = (rng.normal(size=(1, length, n, tower.head_dim)).astype(np.float32) for n in heads)
    borders = (np.array([0, 0.1, 0.45, 0.5, 0.97]) * length).astype(int)
    segments, span = np.zeros((1, length), np.int32), np.arange(length, dtype=np.int32)[None].copy()
    for i, (start, end) in enumerate(itertools.pairwise(borders)):
        segments[0, start:end] = i + 1
        image = slice(start + (end - start) // 4, start + (end - start) // 2)
        span[0, image] = image.stop - 1
    return [q, k, v, segments, span, weight]


def main(out: Path | None = None, length: int | None = None) -> None:
    """Print a row for each tower, length and form.

    Args:
        out: Also write the rows to this JSON file.
        length: Tokens of a row; default: the lengths that the models are trained at.
    """
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
    here = jax.devices()[0].platform == "gpu"
    rows: list[Row] = []
    with contextlib.nullcontext(jax.devices()[0]) if here else absent() as device:
        mesh = sharding.make_mesh({"fsdp": 1}, [device])
        memory = device.memory_stats()["bytes_limit"] / MIB if here else H100_MIB
        for name, tower in TOWERS.items():
            for T in (length,) if length else tower.lengths:
                found = compile_and_time(name, tower, T, mesh, memory if here else 0)
                print(*found, sep="\n", flush=True)
                rows += found
                facts = {"device": device.device_kind, "memory_mib": memory, "ran": here, "jax": jax.__version__}
                if out:
                    out.write_text(
                        json.dumps(facts | {"rows": [dataclasses.asdict(row) for row in rows]}, indent=1) + "\n"
                    )


@contextlib.contextmanager
def absent() -> Iterator[Any]:
    """An absent H100 as JAX's default device, which tokamax asks for its capabilities."""
    try:
        device = topologies.get_topology_desc("h100", "cuda", target_config=H100, topology="1x1x1").devices[0]
    except NotImplementedError:
        raise SystemExit("JAX has no compiler for GPUs here; run `pip install -e '.[cuda]'` (Linux)") from None
    default_device = jax_backend.get_default_device
    jax_backend.get_default_device = lambda: device
    try:
        yield device
    finally:
        jax_backend.get_default_device = default_device


def compile_and_time(name: str, tower: Tower, length: int, mesh: jax.sharding.Mesh, memory: float) -> list[Row]:
    """A row for each form; programs whose temporaries take less than ``memory`` MiB are run."""
    placement = NamedSharding(mesh, PartitionSpec())
    values = inputs(tower, length)
    low = [jnp.bfloat16 if x.dtype == np.float32 else x.dtype for x in values]
    shapes = [jax.ShapeDtypeStruct(x.shape, dtype, sharding=placement) for x, dtype in zip(values, low, strict=True)]
    options = {} if memory else {"xla_gpu_autotune_level": 0}  # tuning would need the chip
    rows, programs = [], {}
    with jax.set_mesh(mesh):
        for form in FORMS:
            gradient = jax.jit(jax.value_and_grad(loss(tower, form), argnums=(0, 1, 2)))
            programs[form] = gradient.lower(*shapes).compile(compiler_options=options)
            sums, text = programs[form].memory_analysis(), programs[form].as_text()
            assert sums is not None and text is not None
            kernels = text.count('target="mosaic_gpu')
            if form == "kernels" and not kernels:
                raise SystemExit(
                    "this GPU, or this installation, has no attention kernels (see models/attention/flash.py)"
                )
            rows.append(Row(name, length, form, sums.temp_size_in_bytes / MIB, kernels))
        running = [row for row in rows if row.temp_mib < 0.9 * memory]
        if running:
            placed = [jax.device_put(jnp.asarray(x, dtype), placement) for x, dtype in zip(values, low, strict=True)]
            exact = [x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for x in placed]
            with jax.default_matmul_precision("highest"):
                want = jax.jit(jax.value_and_grad(loss(tower, "blocks"), argnums=(0, 1, 2)))(*exact)
            for row in running:
                row.error = difference(programs[row.form](*placed), want)
            turns = [[seconds(programs[row.form], placed) for row in running] for _ in range(TURNS)]
            for row, times in zip(running, zip(*turns, strict=True), strict=True):
                row.milliseconds = 1e3 * statistics.median(times)
    return rows


def difference(got: Any, want: Any) -> float:
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return max(float(jnp.abs(a.astype(jnp.float32) - b).max() / jnp.abs(b).max()) for a, b in pairs)


def seconds(program: Callable[..., Any], args: list[jax.Array]) -> float:
    began = time.perf_counter()
    for _ in range(5):
        result = program(*args)
    jax.block_until_ready(result)
    return (time.perf_counter() - began) / 5


if __name__ == "__main__":
    tyro.cli(main)
