"""Norms and learning rates by module (vision, projector, decoder: the first part of a parameter's path)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import jax
import optax


def module_norms(flat: Mapping[tuple, jax.Array], name: str) -> dict[str, jax.Array]:
    """The norm over each module's arrays, in fp32; for use inside the jitted step.

    Args:
      flat: {path: array} of gradients or updates.
      name: "grad_norm" gives {"grad_norm/decoder": …}.
    """
    modules: dict[str, list[jax.Array]] = defaultdict(list)
    for path, array in flat.items():
        modules[path[0]].append(array.astype("float32"))
    return {f"{name}/{module}": optax.global_norm(arrays) for module, arrays in sorted(modules.items())}


def learning_rates(rate: float, multipliers: Mapping[tuple, float]) -> dict[str, float]:
    """The learning rate of each module: {"lr/decoder": …}.

    Args:
      rate: of the schedule, at this step.
      multipliers: {path: multiplier}; 0 is frozen.

    Returns:
      The largest rate in each module, 0 where all of it is frozen; if its trainable parameters have several rates, also
      the smallest, as "lr/decoder/min".
    """
    modules: dict[str, set[float]] = defaultdict(set)
    for path, scale in multipliers.items():
        modules[path[0]].add(float(scale))
    row = {}
    for module, scales in sorted(modules.items()):
        row[f"lr/{module}"] = rate * max(scales)
        if len(trainable := scales - {0.0}) > 1:
            row[f"lr/{module}/min"] = rate * min(trainable)
    return row
