"""Generation on a slice: memory of weights and KV cache, a batch that fits, modelled times of prefill and decoding.

Weights are bf16, on the mesh that ``load`` chooses for such devices (``sharding.generation_sizes``). The batch is
computed, and made smaller until prefill and decoding, compiled as one program, fit; a larger one may fit too.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from phivision_jax.hardware.flops import Workload, step_flops
from phivision_jax.hardware.topology import GIB, Topology
from phivision_jax.models import phivision
from phivision_jax.preflight.model import roofline
from phivision_jax.preflight.step_report import MARGIN, memory_facts, verdict
from phivision_jax.sharding import generation_sizes
from phivision_jax.training.run_config import ResolvedConfig


def plan(cfg: ResolvedConfig, where: Topology, prompt: int, new_tokens: int) -> dict[str, Any]:
    """Choose mesh and batch, and compute bytes per chip.

    Args:
      prompt, new_tokens: length of a prompt and of its answer.

    Raises:
      ValueError: when the weights leave no room for a single prompt.
    """
    decoder, state = cfg.model.decoder, phivision.abstract(cfg.model)[1]
    weights = 2 * sum(leaf.size for leaf in jax.tree.leaves(state))
    hbm = where.chip.hbm_bytes // where.chip.devices
    mesh = generation_sizes(state, 2, where.devices, hbm)
    replicas, fsdp, tensor = mesh.values()
    row = 2 * 2 * decoder.num_layers * (prompt + new_tokens) * decoder.num_kv_heads * decoder.head_dim  # keys, values
    # Prefill needs the activations and the widest product of one row at a time.
    working = prompt * (decoder.hidden_size * 4 + 2 * decoder.intermediate_size / tensor) * 2
    room = hbm * (1 - MARGIN) - weights / (tensor * fsdp)
    # The decoding loop holds the cache twice: its input and its output.
    per_device = int(room // (2 * row / tensor + working))
    if per_device < 1:
        raise ValueError(
            f"{where}: weights of {weights / GIB:.1f} GiB over {tensor * fsdp} devices leave no room for one prompt of "
            f"{prompt:,} tokens and {new_tokens:,} new ones; take more chips or fewer tokens"
        )
    return {
        "topology": where.xla_name,
        "mesh": mesh,
        "weights_bytes_per_chip": weights / (tensor * fsdp) * where.chip.devices,
        "cache_bytes_per_row": row,
        "rows_per_device": per_device,
        "batch_rows": per_device * replicas * fsdp,
        "prompt": prompt,
        "new_tokens": new_tokens,
    }


def confirm(chosen: dict[str, Any], where: Topology, attempt: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """The plan with the first batch that the compiler accepts, and its memory.

    Args:
      attempt: compiles generation as planned and returns the worker's facts.
    """
    tried, mesh = chosen, chosen["mesh"]
    while not (facts := attempt(tried))["fits"] and tried["rows_per_device"] > 1:
        rows = tried["rows_per_device"] * 3 // 4
        tried = chosen | {"rows_per_device": rows, "batch_rows": rows * mesh["data"] * mesh["fsdp"]}
    return tried | memory_facts(where, facts)


def times(cfg: ResolvedConfig, where: Topology, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Modelled seconds: prefill multiplies while weights are gathered, decoding reads weights and cache for each token.

    Products of new tokens with the cache are left out: reading the cache takes longer.

    Raises:
      ValueError: for chips without published runs to fit, or without published bandwidths.
    """
    rows, mesh = chosen["batch_rows"], chosen["mesh"]
    image = min(cfg.model.max_patches, chosen["prompt"])

    def seconds(length: int, images: list[int], **traffic: float) -> float:
        flops = step_flops(cfg.model, Workload.of_examples(rows, length, images)).forward / where.chips
        return roofline.step_time(roofline.Work(flops, **traffic), where.generation).seconds

    gathered = chosen["weights_bytes_per_chip"] * (mesh["fsdp"] - 1)
    cache = chosen["cache_bytes_per_row"] * chosen["rows_per_device"] / mesh["tensor"] * where.chip.devices
    read = chosen["weights_bytes_per_chip"] * mesh["fsdp"] + cache
    step = seconds(1, [], hbm_bytes=read, ici_bytes_exposed=gathered)
    return {
        "modelled_prefill_seconds": seconds(chosen["prompt"], [image], ici_bytes_overlapped=gathered),
        "modelled_decode_step_seconds": step,
        "modelled_decode_tokens_per_second": rows / step,
    }


def text(found: Mapping[str, Any]) -> str:
    """The report for a terminal, of ``confirm`` and ``times``."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in found["mesh"].items())
    lines = [
        f"  weights in bf16   {found['weights_bytes_per_chip'] / GIB:.2f} GiB a chip ({mesh})",
        f"  KV cache          {found['cache_bytes_per_row'] / GIB:.2f} GiB per prompt of {found['prompt']:,} tokens "
        f"and {found['new_tokens']:,} new ones",
        f"  batch             {found['batch_rows']:,} prompts ({found['rows_per_device']} a device); more may fit",
        f"  {verdict(found)}",
    ]
    if "not_modelled" in found:
        return "\n".join([*lines, f"  not modelled: {found['not_modelled']}"])
    lines.append(f"  prefill           {found['modelled_prefill_seconds']:.2f} s (modelled)")
    step, rate = found["modelled_decode_step_seconds"], found["modelled_decode_tokens_per_second"]
    return "\n".join([*lines, f"  one token each    {step * 1000:.1f} ms, {rate:,.0f} tokens/s (modelled)"])
