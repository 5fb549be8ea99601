"""The data of a run: the mixtures that it trains on and that its validation loss is measured on, and their batches.

    data.path ──► stage ──► + replay ──► without held-out records ──► training
                                         held-out records only    ──► validation, or data.validation_path

A record is held out by its number in its dataset and ``data.seed`` (``Mixture.eligible``), independently of epochs, row
sizes, the model and the number of hosts. Plan inputs contain the share, so a run cannot continue with another.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from phivision_jax.batch import Batch, batch_spec
from phivision_jax.data.feed import encode, pipeline
from phivision_jax.data.plan.mixture import Mixture
from phivision_jax.data.plan.plan import Plan, make_plan
from phivision_jax.data.store.dataset import Dataset
from phivision_jax.processor import Processor
from phivision_jax.training.run_config import DataConfig, ResolvedConfig
from phivision_jax.training.step import TrainStep


def training_mixture(data: DataConfig) -> Mixture:
    """The mixture to train on.

    Raises:
      ValueError: without a path, for a path that is no dataset, for incomplete replay settings, for a share outside
        0 … 1; as ``Mixture.read``.
      FileNotFoundError: when the mixture file does not exist.
    """
    if not data.path:
        raise ValueError("data.path is empty: give --config.data.path=DIRECTORY (phivision data import makes one)")
    mixture = Mixture.read(data.path, epochs=data.epochs)
    if data.stage:
        mixture = mixture.only(data.stage)
    if data.replay_path or data.replay_share:
        if not data.replay_path or not 0 < data.replay_share < 1:
            given = f"data.replay_path={data.replay_path!r} and data.replay_share={data.replay_share:g}"
            raise ValueError(f"{given} belong together: give a path and a share between 0 and 1, or neither")
        mixture = mixture.with_replay(data.replay_path, data.replay_share)
    return dataclasses.replace(mixture, held_out=data.validation_share)


def validation_mixture(data: DataConfig) -> Mixture | None:
    """The mixture for the validation loss; None if there is none.

    Raises:
      ValueError: when both a path and a share are given.
    """
    if data.validation_path and data.validation_share:
        raise ValueError("data.validation_path and data.validation_share are two validation sets: give one")
    if data.validation_path:
        return Mixture.read(data.validation_path)
    return training_mixture(data).validation() if data.validation_share else None


def validation_datasets(data: DataConfig) -> list[Dataset]:
    """The datasets of ``data.validation_path``."""
    mixture = validation_mixture(data) if data.validation_path else None
    return [Dataset.open(path) for _, path in mixture.sources] if mixture else []


def validation_plan(
    data: DataConfig, processor: Processor, trained_on: Sequence[Dataset]
) -> tuple[list[Dataset], Plan] | None:
    """Datasets and rows for the validation loss, in training's row sizes; None if there is none.

    It is not saved: it follows from the configuration, like the plan of the training data.

    Args:
      trained_on: the datasets of ``training_mixture(data)``, in order.

    Raises:
      ValueError: when ``validation_path`` has a dataset that is trained on, or no record is left; as ``make_plan``.
    """
    mixture = validation_mixture(data)
    if mixture is None:
        return None
    datasets, known = validation_datasets(data), {dataset.hash: dataset.directory for dataset in trained_on}
    for dataset in datasets:
        if dataset.hash in known:
            same = f"{dataset.directory} holds the records of {known[dataset.hash]}, which is trained on"
            raise ValueError(f"data.validation_path: {same}; use other data, or hold out data.validation_share")
    datasets, rows = datasets or list(trained_on), data.row_shape(processor.config)
    fit = "drop" if data.on_overflow == "error" else data.on_overflow
    plan = make_plan(datasets, mixture, processor, rows, batch_rows=data.batch_rows, seed=data.seed, on_overflow=fit)
    return datasets, plan


class Feed:
    """Encodes this process's rows of each batch of a plan, and places them on its devices.

    Args:
      step: the training step, for its mesh and sharding rules.
      datasets: the datasets of ``plan``.
      groups: names of the groups that metrics and ``loss_weights`` distinguish; default: those of the datasets.
    """

    def __init__(
        self,
        cfg: ResolvedConfig,
        step: TrainStep,
        datasets: Sequence[Dataset],
        plan: Plan,
        processor: Processor,
        groups: Sequence[str] | None = None,
    ) -> None:
        self.groups = encode.group_names(datasets) if groups is None else groups
        self._data, self._source = cfg.data, (datasets, plan, processor)
        self.spec = batch_spec(cfg.data.batch_rows, cfg.data.row_shape(cfg.model), cfg.model.vision.patch_dim)
        """Shapes of a global batch."""
        self._shardings = step.batch_shardings(self.spec)
        self.own_rows = pipeline.rows_of_process(self._shardings.tokens, cfg.data.batch_rows)
        """Rows of a batch that this process encodes."""

    def batches(self, first: int, last: int, *, weighted: bool = True) -> Iterator[tuple[Batch, pipeline.BatchInfo]]:
        """This process's rows of every step after ``first``, to ``last``.

        Args:
          weighted: apply the run's ``loss_weights``.
        """
        weights = encode.group_weights(self._data.loss_weights, self.groups) if weighted else None
        settings: dict[str, Any] = {"batch_rows": self._data.batch_rows, "num_threads": self._data.num_threads}
        settings |= {"rows_here": self.own_rows, "groups": self.groups, "loss_weights": weights}
        return pipeline.batches(*self._source, start_step=first, end_step=last, **settings)

    def place(self, batch: Batch) -> Batch:
        """Put this process's rows on its devices, as a part of the global batch."""
        return pipeline.to_device(batch, self._shardings, self._data.batch_rows)
