"""What generation takes on a slice: weights, KV cache, the largest batch, and the times of prefill and of one token.

Weights are bf16 and split over ``tensor`` (two: ten KV heads) and as few ``fsdp`` parts as leave room for the cache;
the rest of the slice are copies, each with prompts of its own. The largest batch is found by arithmetic and confirmed
by the compiler, prefill and decoding in one program.
"""

from __future__ import annotations

from typing import Any

from phivision_jax.preflight import roofline
from phivision_jax.preflight.flops import Workload, step_flops
from phivision_jax.preflight.report import MARGIN
from phivision_jax.preflight.topology import GIB, Topology
from phivision_jax.training.config import RunConfig

TENSOR = 2
WEIGHTS_SHARE = 0.55
"""Of the HBM, at most: the cache is what makes generation fast."""
TRAINED_NOTHING = ((".", 0.0),)


def parameters(cfg: RunConfig) -> int:
    import jax

    from phivision_jax.models import phivision

    return sum(leaf.size for leaf in jax.tree.leaves(phivision.abstract(cfg.model)[1]))


def plan(cfg: RunConfig, where: Topology, prompt: int, new_tokens: int) -> dict[str, Any]:
    """Mesh, bytes per device, and the batch that arithmetic allows.

    Raises:
      ValueError: when the weights leave no room for a single prompt on all chips together.
    """
    decoder, weights = cfg.model.decoder, 2 * parameters(cfg)
    hbm = where.hbm_bytes_per_device
    tensor = TENSOR if where.devices % TENSOR == 0 and decoder.num_kv_heads % TENSOR == 0 else 1
    groups = [n for n in (1, 2, 4, 8, 16, 32) if where.devices % (tensor * n) == 0]
    fsdp = next((n for n in groups if weights / (tensor * n) <= WEIGHTS_SHARE * hbm), groups[-1])
    copies = where.devices // (tensor * fsdp)
    row = 2 * 2 * decoder.num_layers * (prompt + new_tokens) * decoder.num_kv_heads * decoder.head_dim  # keys, values
    # Prefill holds, for a row at a time, its activations and the widest product.
    working = prompt * (decoder.hidden_size * 4 + 2 * decoder.intermediate_size / tensor) * 2
    room = hbm * (1 - MARGIN) - weights / (tensor * fsdp)
    # The loop keeps the cache twice while it passes it on: what comes in, and what goes out.
    per_device = int(room // (2 * row / tensor + working))
    if per_device < 1:
        raise ValueError(
            f"{where}: weights of {weights / GIB:.1f} GiB over {tensor * fsdp} chips leave no room for one prompt of "
            f"{prompt:,} tokens and {new_tokens:,} new ones; take more chips or fewer tokens"
        )
    return {
        "mesh": {"data": copies, "fsdp": fsdp, "tensor": tensor},
        "weights_bytes_per_chip": weights / (tensor * fsdp) * where.devices / where.chips,
        "cache_bytes_per_row": row,
        "rows_per_device": per_device,
        "batch_rows": per_device * copies * fsdp,
        "prompt": prompt,
        "new_tokens": new_tokens,
    }


def times(cfg: RunConfig, where: Topology, chosen: dict[str, Any]) -> dict[str, float]:
    """Modelled seconds of prefill (products at the fitted efficiency) and of a decoding step (weights, cache once)."""
    rows, prompt = chosen["batch_rows"], chosen["prompt"]
    patches = min(cfg.model.max_patches, prompt)
    work = Workload.of_means(rows, prompt, [patches])
    forward = step_flops(cfg.model, work, TRAINED_NOTHING).forward / where.chips
    prefill = forward / (where.peak_bf16_flops * roofline.EFFICIENCY[where.generation])
    cache = chosen["cache_bytes_per_row"] * chosen["rows_per_device"] / chosen["mesh"]["tensor"]
    read = (chosen["weights_bytes_per_chip"] * chosen["mesh"]["fsdp"] + cache) / where.hbm_bandwidth
    gathered = chosen["weights_bytes_per_chip"] * (chosen["mesh"]["fsdp"] - 1) / ((where.ici_bandwidth or 1e12) / 2)
    step = read + gathered
    return {
        "modelled_prefill_seconds": prefill,
        "modelled_decode_step_seconds": step,
        "modelled_decode_tokens_per_second": rows / step,
    }
