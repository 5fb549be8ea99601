"""Generation on a slice: how many slots fit, and the modelled time of a token, from the engine's compiled programs.

Weights are on the mesh that ``load`` chooses for such devices (``sharding.generation_sizes``). The number of slots is
computed, and changed until one more per device would not leave a margin. Decoding reads all weights and the cache for
each token; the bound of its time is what it must read over the bandwidth of the HBM.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from phivision_jax.hardware.flops import Workload, step_flops
from phivision_jax.hardware.topology import GIB, Topology
from phivision_jax.inference.local import CHUNK, IMAGE_BYTES
from phivision_jax.models import phivision
from phivision_jax.preflight.model import roofline
from phivision_jax.preflight.step_report import MARGIN, memory_facts, verdict
from phivision_jax.sharding import generation_sizes
from phivision_jax.training.run_config import ResolvedConfig

type Attempt = Callable[[dict[str, Any]], dict[str, dict[str, Any]]]
"""Compiles a plan's programs, the last of which may not fit, and returns the worker's facts of each."""
TRIES = 6
"""Most numbers of slots that are compiled. The memory of a slot is known, so two or three are enough."""


def plan(
    cfg: ResolvedConfig, where: Topology, length: int, slots: int | None, weights: str | None, cache: str
) -> dict[str, Any]:
    """Choose the mesh, compute bytes per device, and estimate how many slots fit.

    Args:
      length: tokens of a slot, prompt and answer together.
      slots: take this number instead.
      weights: "int8", or None for bf16.
      cache: dtype of keys and values.

    Raises:
      ValueError: when the weights leave no room for a single slot.
    """
    decoder, dtype = cfg.model.decoder, jnp.dtype(cache)
    params = phivision.abstract(cfg.model, dtype=jnp.bfloat16, weights=weights)[1]
    hbm = where.chip.hbm_bytes // where.chip.devices
    mesh = generation_sizes(params, 2, where.devices, hbm)
    replicas, fsdp, tensor = mesh.values()
    held = _weights(params) / (fsdp * tensor)
    per_head = decoder.head_dim * dtype.itemsize + (4 if dtype == jnp.int8 else 0)  # with its scale
    heads = decoder.num_kv_heads / (tensor if decoder.num_kv_heads % tensor == 0 else 1)
    token = int(2 * decoder.num_layers * heads * per_head)
    room = (
        (1 - MARGIN) * hbm
        - held
        - IMAGE_BYTES
        - CHUNK * 2 * (4 * decoder.hidden_size + 2 * decoder.intermediate_size / tensor)
    )
    fitting = max(int(room // (token * (length + 256))), int(held < hbm))  # the compiler decides about the first slot
    per_device = fitting if slots is None else -(-slots // (replicas * fsdp))
    if per_device < 1:
        raise ValueError(
            f"{where}: weights of {held / GIB:.1f} GiB a device leave no room for a slot of {length:,} tokens; take "
            "more chips, fewer tokens, or int8"
        )
    read = _weights(params["decoder"]) - _weights(params["decoder"]["embed_tokens"])
    return {
        "topology": where.xla_name,
        "mesh": mesh,
        "weights": weights,
        "cache": cache,
        "length": length,
        "weights_bytes_per_device": held,
        "read_weights_bytes_per_device": read / (fsdp * tensor),
        "cache_bytes_per_token": token,
        "slots_per_device": per_device,
        "slots": per_device * replicas * fsdp,
    }


def _weights(params: Any) -> int:
    return sum(min(leaf.dtype.itemsize, 2) * leaf.size for leaf in jax.tree.leaves(params))


def largest(chosen: dict[str, Any], where: Topology, attempt: Attempt) -> dict[str, Any]:
    """The plan with the most slots that leave ``MARGIN`` free, and the facts of its programs; else with one per device.

    Without that margin the compiler saves memory by computing scores twice, so that a token reads the keys twice.
    """
    shards, limit = chosen["slots"] // chosen["slots_per_device"], (1 - MARGIN) * where.chip.hbm_bytes
    fitting, too_many, n = dict[str, Any](), 2**30, chosen["slots_per_device"]
    for _ in range(TRIES):
        found = checked(chosen | {"slots_per_device": n, "slots": n * shards}, where, attempt)
        free = (limit - (found["peak_bytes_per_chip"] or limit)) / where.chip.devices
        more = int(free // (found["cache_bytes_per_device"] / n))
        if found["fits"] and free >= 0:
            fitting, n = found, min(n + more, too_many - 1)
        else:
            too_many, n = n, max(n + min(more, -1), fitting.get("slots_per_device", 0) + 1)
        if n in (fitting.get("slots_per_device"), too_many):
            break
    return fitting or found


def checked(chosen: dict[str, Any], where: Topology, attempt: Attempt) -> dict[str, Any]:
    """The plan with the facts of its programs: memory of the one that needs most, and what decoding does."""
    programs = attempt(chosen)
    most = max(programs.values(), key=lambda facts: (not facts["fits"], facts["peak_bytes"] or 0))
    found = chosen | memory_facts(where, most) | {"cache_bytes_per_device": most["memory"]["cache"]}
    if not found["fits"]:
        return found
    decode, rows = programs["decode"], chosen["slots_per_device"]
    needed = chosen["read_weights_bytes_per_device"] + rows * chosen["length"] * chosen["cache_bytes_per_token"]
    names = ("temporary_bytes", "moved_bytes", "wire_bytes", "copies")
    return found | {
        **{f"decode_{name}": decode[name] for name in names},
        "admit_temporary_bytes": programs["admit"]["temporary_bytes"],
        "decode_temporary_share": decode["temporary_bytes"] / most["memory"]["cache"],
        "decode_bound_bytes": needed,
        "decode_bytes_over_bound": decode["moved_bytes"] / needed,
    }


def times(cfg: ResolvedConfig, where: Topology, found: Mapping[str, Any]) -> dict[str, Any]:
    """Modelled seconds of a token of every slot, and of a full row of prompts per shard.

    Products of decoding are left out: reading takes longer.

    Raises:
      ValueError: for chips without published runs to fit, or without published bandwidths.
    """
    devices, mesh = where.chip.devices, found["mesh"]
    shards = mesh["data"] * mesh["fsdp"]
    gathered = found["weights_bytes_per_device"] * devices * (mesh["fsdp"] - 1)
    flops = step_flops(cfg.model, Workload.of_examples(shards, CHUNK, [min(cfg.model.max_patches, CHUNK)])).forward
    prefill = roofline.Work(flops / where.chips, ici_bytes_overlapped=gathered)
    sent = {"ici_bytes_exposed": found["decode_wire_bytes"] * devices}
    step = roofline.step_time(roofline.Work(hbm_bytes=found["decode_moved_bytes"] * devices, **sent), where.generation)
    return {
        "modelled_prefill_tokens_per_second": shards * CHUNK / roofline.step_time(prefill, where.generation).seconds,
        "modelled_decode_step_seconds": step.seconds,
        "modelled_decode_tokens_per_second": found["slots"] / step.seconds,
        "modelled_decode_time_over_bound": step.seconds
        / (found["decode_bound_bytes"] * devices / where.chip.hbm_bandwidth),
    }


def text(found: Mapping[str, Any]) -> str:
    """The report for a terminal, of ``largest`` or ``checked``, and ``times``."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in found["mesh"].items())
    slot = found["cache_bytes_per_token"] * found["length"]
    rows = {
        "weights": f"{found['weights'] or 'bfloat16'}, {_gib(found['weights_bytes_per_device'])} a device ({mesh})",
        "KV cache": f"{found['cache']}, {_gib(slot)} a device for a slot of {found['length']:,} tokens",
        "slots": f"{found['slots']:,} ({found['slots_per_device']} a device)",
        "": verdict(found),
    }
    if found["fits"]:
        copies = found["decode_copies"]
        seen = f"{len(copies)} copies as large as a layer of it: {copies[0]}" if copies else "no copy of it"
        moved, over = found["decode_moved_bytes"], found["decode_bytes_over_bound"]
        rows["decoding holds"] = f"{found['decode_temporary_share']:.1%} of the cache besides; {seen}"
        rows["decoding moves"] = f"{_gib(moved)} for one token each, {over:.2f} x weights and cache"
    if "not_modelled" in found:
        rows["not modelled"] = found["not_modelled"]
    elif found["fits"]:
        step, over = found["modelled_decode_step_seconds"], found["modelled_decode_time_over_bound"]
        rate, prefill = found["modelled_decode_tokens_per_second"], found["modelled_prefill_tokens_per_second"]
        rows["one token each"] = f"{step * 1000:.1f} ms, {over:.2f} x the bound; {rate:,.0f} tokens/s (modelled)"
        rows["prefill"] = f"{prefill:,.0f} tokens/s (modelled)"
    return "\n".join(f"  {name:<18}{value}" for name, value in rows.items())


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"
