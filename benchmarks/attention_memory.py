"""Memory of one attention layer on TPUs, forward and backward: our kernel, a dense mask, and no kernel.

    python benchmarks/attention_memory.py --out docs/results/attention_memory.json

One row per chip, 40 query heads and 10 KV heads of 128, bf16. ``mask`` is the input that describes visible pairs: our
O(T) numbers (span_end and segments), or T×T of them. The figures are the TPU compiler's; nothing runs, so no TPU is
needed (Linux x86-64, minutes).
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import jax
import jax.numpy as jnp
import tyro
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from phivision_jax import sharding
from phivision_jax.models.attention import attend, blockwise
from phivision_jax.preflight import memory

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
LENGTHS = (8192, 16_384)
HEADS, KV_HEADS, HEAD_DIM = 40, 10, 128
MIB = 2**20

Loss = Callable[..., jax.Array]


def causal(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(q.shape[1], dtype=jnp.int32), segments.shape)
    return attend.attend(q, k, v, segment_ids=segments, span_end=positions)


def bidirectional(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, span_end: jax.Array) -> jax.Array:
    return attend.attend(q, k, v, segment_ids=segments, span_end=span_end)


def dense_mask(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, mask: jax.Array) -> jax.Array:
    """The same kernel, given a T×T mask at run time."""
    from phivision_jax.models.attention import splash

    config = splash.kernel.SplashConfig(**splash.BLOCKS[sharding.target_device().device_kind]._asdict())

    def local(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, mask: jax.Array) -> jax.Array:
        kernel = splash.kernel.make_dynamic_splash_mha(mask[0], config=config)
        q, k, v = (jnp.swapaxes(x[0], 0, 1) for x in (q, k, v))
        return jnp.swapaxes(kernel(q, k, v, splash.base.SegmentIds(segments[0], segments[0])), 0, 1)[None]

    rows = PartitionSpec("fsdp")
    return jax.shard_map(local, in_specs=(rows,) * 5, out_specs=rows, check_vma=False)(q, k, v, segments, mask)


def plain(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, span_end: jax.Array) -> jax.Array:
    return blockwise.plain(q, k, v, segments, segments, span_end)


@dataclasses.dataclass(frozen=True)
class Row:
    """One compiled layer."""

    chip: str
    length: int
    form: str
    mask_mib: float
    """Arrays that describe visible pairs, per row."""
    temp_mib: float | None
    """Temporaries of forward and backward."""
    needed_mib: float | None
    """The compiler's figure where they do not fit."""


def rows() -> Iterator[Row]:
    for chip, name in CHIPS.items():
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
        mesh = sharding.make_mesh({"fsdp": len(devices)}, devices)
        for length in LENGTHS:
            spans = (((length,), jnp.int32, 1),)
            for form, more in (
                (causal, ()),
                (bidirectional, spans),
                (dense_mask, (((length, length), jnp.bool_, 1),)),
                (plain, spans),
            ):
                extra = [(shape, dtype) for shape, dtype, _ in more]
                mask = 4 * length + sum(jnp.dtype(dtype).itemsize * _size(shape) for shape, dtype in extra)
                temp, needed = compile_layer(form, mesh, len(devices), length, extra)
                yield Row(chip, length, form.__name__, mask / MIB, temp, needed)


def _size(shape: tuple[int, ...]) -> int:
    return shape[0] if len(shape) == 1 else shape[0] * shape[1]


def compile_layer(form: Loss, mesh: Any, batch: int, length: int, extra: list) -> tuple[float | None, float | None]:
    """MiB of temporaries, or the MiB needed if they do not fit."""
    placement = NamedSharding(mesh, PartitionSpec("fsdp"))
    heads = [((length, n, HEAD_DIM), jnp.bfloat16) for n in (HEADS, KV_HEADS, KV_HEADS)]
    args = [
        jax.ShapeDtypeStruct((batch, *shape), dtype, sharding=placement)
        for shape, dtype in (*heads, ((length,), jnp.int32), *extra)
    ]

    def loss(*args: jax.Array) -> jax.Array:
        return form(*args).astype(jnp.float32).sum()

    with jax.set_mesh(mesh):
        lowered = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*args)
        try:
            sums = lowered.compile().memory_analysis()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) and "Mosaic" not in str(error):
                raise
            needed = memory.needed(str(error))
            return None, needed / MIB if needed else None
    assert sums is not None
    return sums.temp_size_in_bytes / MIB, None


def main(out: Path | None = None) -> None:
    """Compile every form for every chip and length (``python -m benchmarks.preflight --tables`` writes the table).

    Args:
        out: Also write the rows to this JSON file.
    """
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
    found = []
    for row in rows():
        print(row, flush=True)
        found.append(row)
    if out:
        out.write_text(json.dumps([dataclasses.asdict(row) for row in found], indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
