"""The loss on data that is not trained on: the training's rows and shardings, forward only, compiled once.

    step ──► batches 0 … n − 1 of the validation plan, the same each time ──► Σ loss, Σ weight by group ──► means

Every host makes the rows that its devices hold, as in training. Sums are divided once, at the end: however examples are
packed into rows, rows into batches and batches over hosts, the mean is over all target tokens alike. The training's
``loss_weights`` do not count here, so that losses of runs that weigh differently can be compared.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from phivision_jax import sharding
from phivision_jax.batch import Batch, batch_spec
from phivision_jax.data.feed.encode import GROUP_NAMES
from phivision_jax.data.feed.pipeline import batches, rows_of_process, to_device
from phivision_jax.data.plan.plan import Plan
from phivision_jax.data.quarantine import Quarantined
from phivision_jax.data.store.dataset import Dataset
from phivision_jax.hardware.compiler_options import compiler_options
from phivision_jax.models import phivision
from phivision_jax.processor import Processor
from phivision_jax.training.loss import batch_loss
from phivision_jax.training.run_config import RunConfig
from phivision_jax.training.step import TrainStep, microbatches

Sums = dict[str, Any]
"""``batch_loss``'s sums: ``correct`` (), ``group_loss`` and ``group_weight`` [groups]."""


class Validator:
    """Measures parameters on the first ``validate_batches`` batches of a plan.

    Args:
      cfg: of the run, with nothing left open.
      step: of the training: its model, mesh, shardings and microbatches.
      datasets: what ``plan`` was made from.
      plan: the validation's (``mixtures.validation_plan``), of the training's row sizes.
      processor: of the run.
    """

    def __init__(
        self, cfg: RunConfig, step: TrainStep, datasets: Sequence[Dataset], plan: Plan, processor: Processor
    ) -> None:
        self._step, self._datasets, self._plan, self._processor = step, datasets, plan, processor
        self._rows, self._threads = cfg.data.batch_rows, cfg.data.num_threads
        self._spec = batch_spec(cfg.data.batch_rows, cfg.data.row_shape(cfg.model), cfg.model.vision.patch_dim)
        # At the start, not when first called: a program that does not fit is to be known before hours of training.
        self._compiled = self.lower().compile(compiler_options(step.mesh))
        self.num_batches = min(cfg.validate_batches, plan.num_steps(cfg.data.batch_rows))
        self.failed: tuple[Quarantined, ...] = ()
        """Records of this host that could not be encoded the last time; they are not in the means."""

    def __call__(self, params: phivision.Params) -> dict[str, float]:
        """The loss on the held-out data, the same on every host.

        Args:
          params: as the training's state holds them; left as they are.

        Returns:
          ``validation/loss``, ``validation/token_accuracy``, and ``validation/loss/think/math`` and so on for every
          mode and task that is there; means over target tokens.
        """
        at = self._step.batch_shardings(self._spec)
        made = batches(
            self._datasets,
            self._plan,
            self._processor,
            batch_rows=self._rows,
            rows_here=rows_of_process(at.tokens, self._rows),
            end_step=self.num_batches,
            num_threads=self._threads,
        )
        failed: list[tuple[Quarantined, ...]] = []
        parts: list[Sums] = []
        for batch, info in made:
            failed.append(info.failed)
            # Waited for: a queue of batches would fill the devices.
            parts.append(jax.device_get(self._compiled(params, to_device(batch, at, self._rows))))
        self.failed = tuple(itertools.chain(*failed))
        return means(parts)

    def lower(self) -> jax.stages.Lowered:
        """The program before it is compiled: sums of one batch."""
        step, metrics = self._step, sharding.replicated(self._step.mesh)
        placed = sharding.abstract(self._spec, step.batch_shardings(self._spec))
        with step.in_force():
            return jax.jit(self.sums, out_shardings=metrics).lower(step.abstract_state["params"], placed)

    def sums(self, params: phivision.Params, batch: Batch) -> Sums:
        """What a batch adds, by as many rows at a time as training takes."""
        step = self._step

        def of(part: Batch) -> Sums:
            model = phivision.merge(step.graphdef, params)
            return batch_loss(model, part, step.num_groups)[1]

        if step.microbatches == 1:
            return of(batch)
        parts = microbatches(batch, step.microbatches)
        like = jax.eval_shape(of, jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
        return jax.lax.scan(lambda sums, part: (jax.tree.map(jnp.add, sums, of(part)), None), zeros, parts)[0]


def means(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, float]:
    """Metrics from the sums of all batches, added up in float64."""
    loss, weight, correct = (
        np.sum([np.asarray(part[name], np.float64) for part in parts], axis=0)
        for name in ("group_loss", "group_weight", "correct")
    )
    total = float(weight.sum())
    if not total:
        raise ValueError("the validation data has no target tokens in its first batches: every record is a hole")
    groups = {
        f"validation/loss/{name}": float(s / w) for name, s, w in zip(GROUP_NAMES, loss, weight, strict=True) if w > 0
    }
    return {
        "validation/loss": float(loss.sum()) / total,
        "validation/token_accuracy": float(correct) / total,
        **groups,
    }
