"""Updates that are not taken: of a loss or gradient that is not finite, or a loss far above those before it.

The decision is made on the devices, inside the step, from values that all of them share: every host skips the same
steps, and a resumed run skips what the undisturbed one did, since what the decision rests on is optimizer state. A step
that is not taken leaves parameters and moments as they were, bit for bit.

    spike    loss > mean + k · deviation     of the losses of accepted steps, averaged over about the last 100:
                                             mean += r · d,  variance = (1 − r) · (variance + r · d²),  d = loss − mean,
                                             r = 1 / min(accepted + 1, 100)     (West 1979; Finch 2009)
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from phivision_jax.io.atomic import with_filename
from phivision_jax.training.run_config import GuardConfig

WINDOW = 100
"""Accepted steps over which the mean and the variance of the loss are taken."""

MOST_NAMED = 8
"""Record ids that a sentence names; the file names all."""


class GuardState(NamedTuple):
    inner: Any
    mean: jax.Array
    variance: jax.Array
    accepted: jax.Array
    skipped_in_a_row: jax.Array
    skipped: jax.Array
    """All of them, since the training began."""


def guarded(tx: optax.GradientTransformation, cfg: GuardConfig) -> optax.GradientTransformationExtraArgs:
    """``tx``, but a step that is not to be taken has zero updates and leaves ``tx``'s state as it was.

    ``update`` takes the step's ``loss`` besides, and whatever ``tx`` takes.

    Raises:
      ValueError: for settings that cannot be.
    """
    if cfg.spike < 0 or cfg.warmup < 1 or cfg.patience < 1:
        raise ValueError(f"guard: spike must not be negative, warmup and patience at least 1, and they are {cfg}")
    tx = optax.with_extra_args_support(tx)

    def init(params: optax.Params) -> GuardState:
        zero, none = jnp.zeros(()), jnp.zeros((), jnp.int32)
        return GuardState(tx.init(params), zero, zero, none, none, none)

    def update(
        grads: optax.Updates, state: GuardState, params: optax.Params | None = None, *, loss: jax.Array, **more: Any
    ) -> tuple[optax.Updates, GuardState]:
        finite = jnp.isfinite(loss) & jnp.isfinite(optax.global_norm(grads))
        limit = state.mean + cfg.spike * jnp.sqrt(state.variance)
        known = (state.accepted >= cfg.warmup) & (cfg.spike > 0)
        take = finite & ~(known & (loss > limit))

        updates, inner = tx.update(grads, state.inner, params, **more)
        updates = jax.tree.map(lambda new: jnp.where(take, new, jnp.zeros_like(new)), updates)
        inner = jax.tree.map(lambda new, old: jnp.where(take, new, old), inner, state.inner)

        accepted = state.accepted + take
        rate = 1 / jnp.clip(accepted, 1, WINDOW)
        change = jnp.where(take, loss - state.mean, 0.0)
        variance = (1 - rate) * (state.variance + rate * change**2)
        return updates, GuardState(
            inner,
            state.mean + rate * change,
            jnp.where(take, variance, state.variance),
            accepted,
            jnp.where(take, 0, state.skipped_in_a_row + 1),
            state.skipped + ~take,
        )

    return optax.GradientTransformationExtraArgs(init, update)


class SkippedSteps:
    """The host's side: names the records of steps that were not taken, and says when it is enough.

    Args:
      run: the run's directory; each process appends its own rows to a file of its own (``record_log.cut_all`` drops
        what an earlier start has lost).
      patience: steps in a row that may be skipped.
      say: told of each skipped step.
      late: steps that may be with the devices; only what is older is looked at, so that nothing is waited for.
    """

    def __init__(self, run: Path, patience: int, say: Callable[[str], None] = print, late: int = 0) -> None:
        process = jax.process_index()
        self.path = run / (f"skipped_{process}.jsonl" if process else "skipped.jsonl")
        self._patience, self._say, self._late = patience, say, late
        self._waiting: deque[tuple[int, dict[str, jax.Array], Sequence[Sequence[str]]]] = deque()

    def take(self, step: int, metrics: Mapping[str, Any], record_ids: Sequence[Sequence[str]]) -> None:
        """Look at a step when it is done, and at those before it.

        Args:
          step: counted from 1, as in the metrics.
          record_ids: of each of this process's rows.

        Raises:
          FloatingPointError: when ``patience`` steps in a row were not taken.
        """
        looked_at = {name: metrics[name] for name in ("loss", "grad_norm", "skipped_in_a_row")}
        self._waiting.append((step, looked_at, record_ids))
        self._look(self._late)

    def drain(self) -> None:
        """Look at all that were taken so far; raises as ``take`` does."""
        self._look(0)

    def _look(self, keep: int) -> None:
        while len(self._waiting) > keep:
            step, metrics, record_ids = self._waiting.popleft()
            host = jax.device_get(metrics)
            if in_a_row := int(host["skipped_in_a_row"]):
                self._skipped(step, float(host["loss"]), float(host["grad_norm"]), in_a_row, record_ids)

    def _skipped(self, step: int, loss: float, norm: float, in_a_row: int, record_ids: Sequence[Sequence[str]]) -> None:
        reason = "spike" if math.isfinite(loss) and math.isfinite(norm) else "not finite"
        line = {"step": step, "reason": reason, "loss": str(loss), "grad_norm": str(norm), "rows": list(record_ids)}
        with with_filename(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        ids = [record_id for row in record_ids for record_id in row]
        named = ", ".join(ids[:MOST_NAMED]) + (f" and {len(ids) - MOST_NAMED} more" if len(ids) > MOST_NAMED else "")
        what = f"step {step} was not taken: its loss is {loss:.4g}, its gradient's norm {norm:.4g} ({reason}); {named}"
        if in_a_row >= self._patience:
            raise FloatingPointError(
                f"{in_a_row} steps in a row were not taken, and training stops here; {what}. All records are in "
                f"{self.path}. If they are sound, the weights are not: look with --replay={step}, go back to an "
                "earlier checkpoint, or, if these are no spikes, go on with --config.guard.spike=0"
            )
        self._say(what)
