"""Rematerialisation policies by name: the values that a scanned layer keeps for its backward pass, and where.

    policy             kept, per token of a decoder layer (bf16)                                 recomputed
    full               x                                                               10 KiB    the entire layer
    attention          x; q, k, v; attention's result and its normalisers              35 KiB    o, gate, up; no splash
    dots               the result of every product with a weight; attention's result  117 KiB    norms, RoPE, SiLU
    none               whatever the gradient of each operation needs                             nothing
    offload            x, in the host's memory                                          0 KiB    the entire layer
    offload_attention  the values of "attention", in the host's memory                  0 KiB    o, gate, up

x is the layer's input. Offloading moves it to pinned host memory and back while other layers compute. With adapters
"dots" also keeps their products.
"""

from collections.abc import Callable
from typing import Any

import jax

INPUT = "layer_input"
QKV = "qkv"
ATTENTION = "attention"
PRODUCT = "product"
"""Names of the values that policies select; ``checkpoint_name`` marks them in the layers."""

_policies = jax.checkpoint_policies


def _offload(*names: str) -> Callable[..., Any]:
    host = {"offload_src": "device", "offload_dst": "pinned_host"}
    offload = _policies.save_and_offload_only_these_names
    return offload(names_which_can_be_saved=[], names_which_can_be_offloaded=list(names), **host)


POLICIES: dict[str, Callable[..., Any] | None] = {
    "full": _policies.nothing_saveable,
    "attention": _policies.save_only_these_names(QKV, ATTENTION),
    "dots": _policies.save_only_these_names(PRODUCT, ATTENTION),
    "none": None,
    "offload": _offload(INPUT),
    "offload_attention": _offload(INPUT, QKV, ATTENTION),
}


def check(policy: str) -> str:
    """Return a policy's name, or raise ValueError if there is no such policy."""
    if policy not in POLICIES:
        raise ValueError(f"remat policy {policy!r} does not exist; choose one of {', '.join(POLICIES)}")
    return policy


def checkpoint(body: Callable[..., Any], policy: str) -> Callable[..., Any]:
    """Wrap a scan body so that its backward pass keeps the values that ``policy`` selects."""
    keep = POLICIES[check(policy)]
    if keep is None:
        return body
    # prevent_cse=True adds optimisation barriers that are needed outside of scan only.
    return jax.checkpoint(body, prevent_cse=False, policy=keep)
