"""The batches of a plan, as this process feeds them to its devices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from phivision_jax.batch import Batch, batch_spec
from phivision_jax.data.feed.encode import group_weights
from phivision_jax.data.feed.pipeline import BatchInfo, batches, rows_of_process, to_device
from phivision_jax.data.plan.plan import Plan
from phivision_jax.data.store.dataset import Dataset
from phivision_jax.processor import Processor
from phivision_jax.training.run_config import ResolvedConfig
from phivision_jax.training.step import TrainStep


class Feed:
    """Encodes this process's rows of each batch, and places them.

    Args:
      step: the training step, for its mesh and sharding rules.
      datasets: the datasets of ``plan``.
    """

    def __init__(
        self, cfg: ResolvedConfig, step: TrainStep, datasets: Sequence[Dataset], plan: Plan, processor: Processor
    ) -> None:
        self._data, self._source = cfg.data, (datasets, plan, processor)
        self.spec = batch_spec(cfg.data.batch_rows, cfg.data.row_shape(cfg.model), cfg.model.vision.patch_dim)
        """Shapes of a global batch."""
        self._shardings = step.batch_shardings(self.spec)
        self.own_rows = rows_of_process(self._shardings.tokens, cfg.data.batch_rows)
        """Rows of a batch that this process encodes."""

    def batches(self, first: int, last: int, *, weighted: bool = True) -> Iterator[tuple[Batch, BatchInfo]]:
        """This process's rows of every step after ``first``, to ``last``.

        Args:
          weighted: apply the run's ``loss_weights``.
        """
        weights = self._data.loss_weights if weighted else ()
        return batches(
            *self._source,
            batch_rows=self._data.batch_rows,
            rows_here=self.own_rows,
            start_step=first,
            end_step=last,
            loss_weights=group_weights(weights) if weights else None,
            num_threads=self._data.num_threads,
        )

    def place(self, batch: Batch) -> Batch:
        """Put this process's rows on its devices, as a part of the global batch."""
        return to_device(batch, self._shardings, self._data.batch_rows)
