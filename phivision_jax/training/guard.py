"""Skip updates with a non-finite loss or gradient, loss spikes, and steps without a target token.

The decision is made on the devices, inside the step, from values that all of them share, and rests on optimizer state:
every host skips the same updates, and a restarted run skips those that the undisturbed one did. A skipped update leaves
parameters and moments as they were, bit for bit.

    spike    loss > mean + k · deviation     over the losses of accepted updates, averaged over about the last 100:
                                             mean += r · d,  variance = (1 − r) · (variance + r · d²),  d = loss − mean,
                                             r = 1 / min(accepted + 1, 100)     (West 1979; Finch 2009)

A step has no target token when no record of it can be decoded, or all weights are 0. Weight decay and momentum would
move the parameters without any data. Such a step is no sign of damaged weights: it does not count as skipped in a row.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from phivision_jax.io import jsonl
from phivision_jax.io.messages import shorten
from phivision_jax.training.run_config import GuardConfig

WINDOW = 100
"""Accepted updates over which mean and variance of the loss are averaged."""
MAX_NAMED = 8
"""Record ids in a message; the log has all of them."""


class GuardState(NamedTuple):
    inner: Any
    mean: jax.Array
    variance: jax.Array
    accepted: jax.Array
    skipped_in_a_row: jax.Array
    skipped: jax.Array
    """Skipped updates since the run began."""


def guarded(tx: optax.GradientTransformation, cfg: GuardConfig) -> optax.GradientTransformationExtraArgs:
    """``tx``, with zero updates and unchanged state where an update is to be skipped.

    ``update`` takes the step's ``loss`` and total ``weight`` of its targets in addition, and whatever ``tx`` takes.

    Raises:
      ValueError: for settings out of range.
    """
    if cfg.spike < 0 or cfg.warmup < 1 or cfg.patience < 1:
        raise ValueError(f"guard: spike must not be negative, warmup and patience at least 1; they are {cfg}")
    tx = optax.with_extra_args_support(tx)

    def init(params: optax.Params) -> GuardState:
        zero, none = jnp.zeros(()), jnp.zeros((), jnp.int32)
        return GuardState(tx.init(params), zero, zero, none, none, none)

    def update(grads: Any, state: Any, params: Any = None, *, loss: Any, weight: Any, **more: Any) -> tuple[Any, Any]:
        finite = jnp.isfinite(loss) & jnp.isfinite(optax.global_norm(grads))
        limit = state.mean + cfg.spike * jnp.sqrt(state.variance)
        ready = (state.accepted >= cfg.warmup) & (cfg.spike > 0)
        accept = finite & ~(ready & (loss > limit)) & (weight != 0)

        updates, inner = tx.update(grads, state.inner, params, **more)
        updates = jax.tree.map(lambda new: jnp.where(accept, new, jnp.zeros_like(new)), updates)
        inner = jax.tree.map(lambda new, old: jnp.where(accept, new, old), inner, state.inner)

        accepted = state.accepted + accept
        rate = 1 / jnp.clip(accepted, 1, WINDOW)
        change = jnp.where(accept, loss - state.mean, 0.0)
        variance = (1 - rate) * (state.variance + rate * change**2)
        mean, variance = state.mean + rate * change, jnp.where(accept, variance, state.variance)
        in_a_row = jnp.where(accept, 0, state.skipped_in_a_row + (weight != 0))
        return updates, GuardState(inner, mean, variance, accepted, in_a_row, state.skipped + ~accept)

    return optax.GradientTransformationExtraArgs(init, update)


class SkippedUpdates:
    """Log the records of skipped updates, and stop training after too many.

    Args:
      run: the run's directory; each process logs its own rows in ``skipped.jsonl``, ``skipped_1.jsonl``, …
      patience: skipped updates in a row that end training.
      log: receives a line for each skipped update.
      late: steps that may still be running; only older ones are examined, so that nothing waits for the devices.
    """

    def __init__(self, run: Path, patience: int, log: Callable[[str], None] = print, late: int = 0) -> None:
        process = jax.process_index()
        self.path = run / (f"skipped_{process}.jsonl" if process else "skipped.jsonl")
        self._patience, self._log, self._late = patience, log, late
        self._waiting: deque[tuple[int, dict[str, jax.Array], Sequence[Sequence[str]]]] = deque()

    def add(self, step: int, metrics: Mapping[str, Any], record_ids: Sequence[Sequence[str]]) -> None:
        """Examine a step later, and earlier ones now.

        Args:
          step: from 1, as in the metrics.
          record_ids: of each of this process's rows.

        Raises:
          FloatingPointError: after ``patience`` skipped updates in a row.
        """
        examined = {name: metrics[name] for name in ("loss", "weight", "grad_norm", "skipped_in_a_row")}
        self._waiting.append((step, examined, record_ids))
        self.drain(self._late)

    def drain(self, keep: int = 0) -> None:
        """Examine all steps but the newest ``keep``. Errors as ``add``."""
        while len(self._waiting) > keep:
            step, metrics, record_ids = self._waiting.popleft()
            host = {name: float(value) for name, value in jax.device_get(metrics).items()}
            if host["skipped_in_a_row"] or not host["weight"]:
                self._report(step, host, record_ids)

    def _report(self, step: int, host: Mapping[str, float], record_ids: Sequence[Sequence[str]]) -> None:
        loss, norm, in_a_row = host["loss"], host["grad_norm"], int(host["skipped_in_a_row"])
        reason = "spike" if math.isfinite(loss) and math.isfinite(norm) else "not finite"
        reason = reason if host["weight"] else "no target token"
        row = {"step": step, "reason": reason, "loss": str(loss), "grad_norm": str(norm), "rows": list(record_ids)}
        jsonl.append(self.path, row)
        ids = [record_id for row_ids in record_ids for record_id in row_ids]
        named, more = ", ".join(map(shorten, ids[:MAX_NAMED])), len(ids) - MAX_NAMED
        what = f"the update of step {step} was skipped ({reason}): loss {loss:.4g}, gradient norm {norm:.4g}; {named}"
        what += f" and {more} more" * (more > 0)
        if in_a_row >= self._patience and host["weight"]:
            remedy = f"inspect with --replay={step}, go back to an earlier checkpoint, or, if these are no spikes,"
            sound = f"If they are sound, the weights are not: {remedy} continue with --config.guard.spike=0"
            many = f"training stops after {in_a_row} skipped updates in a row"
            raise FloatingPointError(f"{many}; {what}. All records are in {self.path}. {sound}")
        self._log(what)
