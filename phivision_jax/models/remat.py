"""Rematerialisation policies by name: what a scanned block keeps for its backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

POLICIES: dict[str, Callable[..., bool] | None] = {
    "full": jax.checkpoint_policies.nothing_saveable,  # keep the block's input only, compute the rest again
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # keep the results of weight products
    "none": None,  # keep everything
}


def checkpoint(body: Callable[..., Any], policy: str) -> Callable[..., Any]:
    """Wrap a scan body so that its backward keeps what ``policy`` names.

    Raises:
      ValueError: for a policy that does not exist.
    """
    if policy not in POLICIES:
        raise ValueError(f"remat policy {policy!r} does not exist; choose one of {', '.join(POLICIES)}")
    if POLICIES[policy] is None:
        return body
    # prevent_cse only matters outside of scan, where it costs optimisation barriers.
    return jax.checkpoint(body, prevent_cse=False, policy=POLICIES[policy])
