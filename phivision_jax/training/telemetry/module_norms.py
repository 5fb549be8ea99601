"""What is told apart by module (vision, projector, decoder): norms and learning rates, by parameter path."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import jax
import optax


def module_norms(flat: Mapping[tuple, jax.Array], name: str) -> dict[str, jax.Array]:
    """The norm of each module's arrays taken together; for use inside the jitted step.

    Args:
      flat: {path: array} of gradients, say; the first part of a path is the module.
      name: of the whole's norm: "grad_norm" gives {"grad_norm/decoder": …}.

    Returns:
      fp32 scalars, for modules that are in ``flat``. The root of their squares' sum is the whole's norm.
    """
    modules: dict[str, list[jax.Array]] = defaultdict(list)
    for path, array in flat.items():
        modules[path[0]].append(array.astype("float32"))
    return {f"{name}/{module}": optax.global_norm(arrays) for module, arrays in sorted(modules.items())}


def learning_rates(rate: float, multipliers: Mapping[tuple, float]) -> dict[str, float]:
    """Each module's learning rate: {"lr/decoder": …}.

    Args:
      rate: the schedule's, at this step.
      multipliers: {path: what the rate is scaled by}; 0 is frozen.

    Returns:
      A module's largest, 0 where all of it is frozen; and where what trains in it has several, the smallest of those
      as "lr/decoder/min".
    """
    modules: dict[str, set[float]] = defaultdict(set)
    for path, scale in multipliers.items():
        modules[path[0]].add(float(scale))
    row = {}
    for module, scales in sorted(modules.items()):
        row[f"lr/{module}"] = rate * max(scales)
        if len(training := scales - {0.0}) > 1:
            row[f"lr/{module}/min"] = rate * min(training)
    return row
