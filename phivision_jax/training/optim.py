"""The optimizer: AdamW with warm-up and cosine decay, clipping, and a learning rate per parameter pattern.

Modules in metrics (vision, projector, decoder) are the first part of a parameter's path.
"""

from collections.abc import Mapping
from typing import Any

import jax
import optax
from flax import nnx

from phivision_jax import sharding
from phivision_jax.config import matching
from phivision_jax.models.lora import is_adapter
from phivision_jax.training.run_config import OptimConfig, RunConfig

flatten, unflatten = nnx.traversals.flatten_mapping, nnx.traversals.unflatten_mapping
"""Nested dicts to {path: leaf} and back; partitions of the parameters are flat."""


def path_name(path: tuple) -> str:
    return "/".join(map(str, path))


def multipliers(params: dict[str, Any], cfg: OptimConfig) -> dict[tuple, float]:
    """Path of every parameter → learning-rate multiplier; 0 for all but the adapters, if there are any (LoRA).

    Raises:
      ValueError: for a pattern that is not a regular expression, or that matches no parameter.
    """
    paths = {path_name(path): path for path in flatten(params)}
    scales = dict.fromkeys(paths, 1.0)
    for pattern, multiplier in reversed(cfg.lr_rules):
        matched = matching("optim.lr_rules", pattern, list(paths), "parameter")
        scales |= dict.fromkeys(matched, float(multiplier))
    only_adapters = any(map(is_adapter, paths.values()))
    return {path: 0.0 if only_adapters and not is_adapter(path) else scales[name] for name, path in paths.items()}


def partition(params: dict[str, Any], cfg: OptimConfig) -> tuple[dict[tuple, Any], dict[tuple, Any]]:
    """(trainable, frozen) parameters, each {path: leaf}.

    Raises:
      ValueError: when every parameter is frozen.
    """
    scale, flat = multipliers(params, cfg), flatten(params)
    trainable = {path: leaf for path, leaf in flat.items() if scale[path] != 0.0}
    if not trainable:
        what = "adapter (with lora.rank, only adapters train)" if any(map(is_adapter, flat)) else "parameter"
        raise ValueError(f"optim.lr_rules freeze every {what}: there is nothing to train")
    return trainable, {path: leaf for path, leaf in flat.items() if scale[path] == 0.0}


def num_steps(cfg: RunConfig, available: int) -> int:
    """Length of training: ``optim.steps``, else the complete plan of ``available`` steps.

    Raises:
      ValueError: when the plan is too short.
    """
    steps = cfg.optim.steps or available
    if steps > available:
        plan = f"data.epochs={cfg.data.epochs} gives {available:,}"
        raise ValueError(f"optim.steps is {steps:,}, but {plan}; raise data.epochs (or the mixture's)")
    return steps


def schedule(cfg: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: linear from 0 to the peak, then a cosine to ``final_lr_ratio`` of it.

    ``cfg`` counts in steps, as that of a resolved configuration does.
    """
    peak, warmup = cfg.learning_rate, min(cfg.warmup_steps, max(steps - 1, 0))
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(steps, warmup + 1), peak * cfg.final_lr_ratio)


def is_decayed(path: tuple) -> bool:
    """True for kernels of linear layers and their adapters; not for the head, which is a table of embeddings."""
    return (path[-1] == "kernel" and "lm_head" not in path) or is_adapter(path)


def make_optimizer(params: dict[str, Any], cfg: OptimConfig, steps: int) -> optax.GradientTransformationExtraArgs:
    """The transformation for the trainable partition of ``params`` (flat dicts).

    Its ``update`` takes the run's ``step`` in addition: the learning rate follows the schedule through skipped updates
    too, while Adam's own count is of accepted updates.
    """
    scale, rate = multipliers(params, cfg), schedule(cfg, steps)

    def scale_by_rate(updates: dict, state: Any, params: Any = None, *, step: jax.Array, **_: Any) -> tuple[dict, Any]:
        return {path: update * -(scale[path] * rate(step)) for path, update in updates.items()}, state

    return optax.chain(
        optax.clip_by_global_norm(cfg.clip_norm),
        scale_by_adam(cfg),
        optax.add_decayed_weights(cfg.weight_decay, mask=lambda flat: {path: is_decayed(path) for path in flat}),
        optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), scale_by_rate),
    )


def scale_by_adam(cfg: OptimConfig) -> optax.GradientTransformation:
    """Adam in fp32, with moments stored in ``cfg.moment_dtype``.

    Raises:
      ValueError: for bfloat16 moments with b2 > 0.99: a relative change of 1 − b2 would be rounded away (2^-8).
    """
    adam = optax.scale_by_adam(b1=cfg.b1, b2=cfg.b2, eps=cfg.eps)
    if cfg.moment_dtype == "float32":
        return adam
    if cfg.b2 > 0.99:
        raise ValueError(f"optim.moment_dtype='bfloat16' needs optim.b2 <= 0.99, not {cfg.b2}: rounding loses changes")

    def cast(state: Any, dtype: str) -> Any:
        moments = {name: jax.tree.map(lambda x: x.astype(dtype), getattr(state, name)) for name in ("mu", "nu")}
        return state._replace(**moments)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = adam.update(updates, cast(state, "float32"), params)
        return updates, cast(state, cfg.moment_dtype)

    return optax.GradientTransformation(lambda params: cast(adam.init(params), cfg.moment_dtype), update)


def abstract_opt_state(tx: optax.GradientTransformation, params: dict, other: jax.sharding.Sharding) -> Any:
    """Shapes of ``tx``'s state, with moments sharded as their parameters, and everything else as ``other``.

    Left to the compiler, moments would be replicated.

    Args:
      params: ShapeDtypeStructs with shardings.
    """
    state = jax.eval_shape(tx.init, params)
    placed = {path: param.sharding for path, param in params.items()}
    shardings = optax.tree_map_params(tx, lambda _, s: s, state, placed, transform_non_params=lambda _: other)
    return sharding.abstract(state, shardings)


def module_norms(flat: Mapping[tuple, jax.Array], name: str) -> dict[str, jax.Array]:
    """The norm over each module's arrays, in fp32; for use inside the jitted step.

    Args:
      flat: {path: array} of gradients or updates.
      name: "grad_norm" gives {"grad_norm/decoder": …}.
    """

    def norm(module: str) -> jax.Array:
        return optax.global_norm([array.astype("float32") for path, array in flat.items() if path[0] == module])

    return {f"{name}/{module}": norm(module) for module in sorted({path[0] for path in flat})}


def learning_rates(rate: float, multipliers: Mapping[tuple, float]) -> dict[str, float]:
    """The learning rate of each module: {"lr/decoder": …}.

    Args:
      rate: of the schedule, at this step.
      multipliers: {path: multiplier}; 0 is frozen.

    Returns:
      The largest rate in each module, 0 where all of it is frozen; if its trainable parameters have several rates, also
      the smallest, as "lr/decoder/min".
    """
    row = {}
    for module in sorted({path[0] for path in multipliers}):
        scales = {float(scale) for path, scale in multipliers.items() if path[0] == module}
        row[f"lr/{module}"] = rate * max(scales)
        if len(trainable := scales - {0.0}) > 1:
            row[f"lr/{module}/min"] = rate * min(trainable)
    return row
