"""The loss on data that is not trained on: training's row sizes and shardings, forward only, compiled once.

    step ──► batches 0 … n − 1 of the validation plan, always the same ──► Σ loss, Σ weight by group ──► means

Every host encodes the rows that its devices hold, as in training. Sums are divided once, at the end: the mean is over
all target tokens, however examples are packed into rows, rows into batches, and batches over hosts. ``loss_weights``
do not apply, so that runs with different weights can be compared.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from phivision_jax import sharding
from phivision_jax.batch import Batch
from phivision_jax.hardware.compiler_options import compiler_options
from phivision_jax.models import phivision
from phivision_jax.training.loss import batch_loss
from phivision_jax.training.step import TrainStep, sum_over_microbatches
from phivision_jax.training.telemetry.metrics import group_metrics
from phivision_jax.training.train_data import Feed

Sums = dict[str, Any]
"""Sums of ``batch_loss``: ``correct`` (), ``group_loss`` and ``group_weight`` [groups]."""


class Validator:
    """Measures parameters on the first batches of a plan.

    Args:
      step: the training step, for its model, mesh, shardings and microbatches.
      feed: the batches of the validation plan (``train_data.validation_plan``), with training's row sizes.
      num_batches: number of batches to measure on, at most those of the plan.
    """

    def __init__(self, step: TrainStep, feed: Feed, num_batches: int) -> None:
        self._feed, self.num_batches = feed, num_batches

        def sums(params: phivision.Params, batch: Batch) -> Sums:
            model, groups = phivision.merge(step.graphdef, params), step.num_groups
            return sum_over_microbatches(lambda part: batch_loss(model, part, groups)[1], batch, step.microbatches)

        batch = sharding.abstract(feed.spec, step.batch_shardings(feed.spec))
        with step.in_force():
            program = jax.jit(sums, out_shardings=sharding.replicated(step.mesh))
            lowered = program.lower(step.abstract_state["params"], batch)
        # Now, not at the first call: a program that does not fit must show before hours of training.
        self._compiled = lowered.compile(compiler_options(step.mesh))

    def __call__(self, params: phivision.Params) -> dict[str, float]:
        """The loss on the validation data, the same on every host.

        Args:
          params: as in the training state; not donated.

        Returns:
          ``validation/loss``, ``validation/token_accuracy``, and ``validation/loss/think/math`` and so on for every
          mode and task in the data; means over target tokens, without records that cannot be encoded.
        """
        batches = (self._feed.place(batch) for batch, _ in self._feed.batches(0, self.num_batches, weighted=False))
        # Fetched, and so waited for, each time: a queue of batches would fill the devices.
        return means([jax.device_get(self._compiled(params, batch)) for batch in batches], self._feed.groups)


def means(sums: Sequence[Mapping[str, np.ndarray]], groups: Sequence[str]) -> dict[str, float]:
    """Metrics from the sums of all batches, added in float64; ``groups`` are the names of the groups.

    Raises:
      ValueError: without a target token.
    """
    names = ("group_loss", "group_weight", "correct")
    loss, weight, correct = (np.sum([batch[name] for batch in sums], axis=0, dtype=np.float64) for name in names)
    total = float(weight.sum())
    if not total:
        raise ValueError("the first batches of the validation data have no target tokens: no record could be encoded")
    row = {"validation/loss": float(loss.sum()) / total, "validation/token_accuracy": float(correct) / total}
    return row | group_metrics("validation/loss", groups, loss, weight)
