"""From a plan to batches: each host makes the rows its devices hold, on threads, in the plan's order.

    step s ──► plan.rows(s, B) ──► this host's rows ──► read, decode, encode ──► fill_rows ──► Batch ──► to_device
                                   (from the sharding)        a bad record leaves a hole

A step is made from the plan alone, so iteration can begin at any step, on any number of hosts, and gives exactly what
an uninterrupted run gives. A record that cannot be encoded is replaced by a hole of its planned size and named in
``BatchInfo``; an I/O error is tried again, then raised.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import grain
import jax
import numpy as np

from phivision_jax.batch import Batch
from phivision_jax.data.feed.encode import encode_record, hole
from phivision_jax.data.plan.plan import Plan
from phivision_jax.data.quarantine import BadRecord, Quarantined
from phivision_jax.images.naflex import grid_of
from phivision_jax.rows import Example, fill_rows

if TYPE_CHECKING:
    from phivision_jax.data.records import Record
    from phivision_jax.data.store.dataset import Dataset
    from phivision_jax.processor import Processor

IO_ATTEMPTS = 4
IO_FIRST_WAIT_S = 0.5
"""Seconds before the second attempt to read a record; doubled each time."""

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class BatchInfo:
    """What a batch holds, for the host's eyes only."""

    step: int
    record_ids: tuple[tuple[str, ...], ...]
    """Per row of this host's batch, the ids of its records; the n-th is segment n + 1."""
    holes: tuple[Quarantined, ...]
    """Those of them that could not be encoded."""


def batches(
    datasets: Sequence[Dataset],
    plan: Plan,
    processor: Processor,
    *,
    batch_rows: int,
    rows_here: Sequence[int] | None = None,
    start_step: int = 0,
    end_step: int | None = None,
    loss_weights: np.ndarray | None = None,
    num_threads: int = 2,
    prefetch: int = 4,
) -> Iterator[tuple[Batch, BatchInfo]]:
    """The plan's batches from ``start_step`` to ``end_step`` or its end, as NumPy.

    Args:
      datasets: what the plan was made from, in its order.
      plan: it fixes T, R and P.
      processor: of the same fingerprint.
      batch_rows: B, rows of a step over all hosts.
      rows_here: which of the B rows to make, in this order; default all. ``rows_of_process`` gives a host's.
      start_step: resume here.
      end_step: the first step that is not wanted.
      loss_weights: [groups] f32 (``encode.group_weights``): multiplies the weights of an example's target tokens.
      num_threads: how many steps are made at a time; 0 makes them in the caller's thread.
      prefetch: how many steps may be ready ahead of the consumer.

    Raises:
      ValueError: when plan, dataset and processor do not belong together, or a record is not as long as planned.
      IndexError: when ``start_step`` lies behind the plan's end.
    """
    if plan.inputs["sources"] != [dataset.hash for dataset in datasets]:
        given = ", ".join(str(dataset.directory) for dataset in datasets)
        raise ValueError(f"the plan was made from other datasets than {given}; make it again")
    if plan.inputs["processor"] != processor.fingerprint:
        raise ValueError("the plan was made with another tokenizer, chat template or patch settings; make it again")
    steps = plan.num_steps(batch_rows)
    if not 0 <= start_step <= steps:
        raise IndexError(f"start_step {start_step} of a plan with {steps} steps of {batch_rows} rows")
    end = steps if end_step is None else min(end_step, steps)
    here = list(range(batch_rows)) if rows_here is None else list(rows_here)

    def load(step: int) -> tuple[Batch, BatchInfo]:
        rows = plan.rows(step, batch_rows)
        holes: list[Quarantined] = []
        filled: list[list[Example]] = []
        record_ids: list[tuple[str, ...]] = []
        for row in (rows[j] for j in here):
            encoded = [
                _load_example(datasets[s], i, processor, plan.patch_limits.get((s, i)), holes) for s, i in row.tolist()
            ]
            filled.append([example for example, _ in encoded])
            record_ids.append(tuple(record_id for _, record_id in encoded))
        batch = fill_rows(filled, plan.row_shape, processor.config)
        if loss_weights is not None:
            batch = batch._replace(loss_weights=batch.loss_weights * loss_weights[batch.group_ids])
        return batch, BatchInfo(step, tuple(record_ids), tuple(holes))

    if start_step >= end:
        return iter(())
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch if num_threads else 0)
    return iter(grain.MapDataset.range(start_step, end).map(load).to_iter_dataset(options))


def _load_example(
    dataset: Dataset, i: int, processor: Processor, max_patches: int | None, holes: list[Quarantined]
) -> tuple[Example, str]:
    """Record ``i`` encoded, or the hole that it leaves; and its id."""
    config = processor.config
    most = max_patches or config.max_patches
    bounds = config.vision.patch_size, min(config.min_patches, most), most
    planned_text = int(dataset.index.text_tokens[i])
    planned_grids = [grid_of(*size, *bounds) for size in dataset.index.sizes_of(i)]
    record_id, source = f"{dataset.directory.name}:{i}", dataset.directory.name
    try:
        record = _read(dataset, i)
        record_id, source = record.id, record.source
        example = encode_record(record, processor, max_patches)
        found = [image.grid for image in example.images]
        if found != planned_grids:
            raise BadRecord("image-broken", f"images decode to grids {found}, their headers say {planned_grids}")
    except BadRecord as error:
        where = f"{dataset.directory}, record {i}"
        holes.append(Quarantined(record_id, source, error.reason, str(error), where))
        return hole(planned_text, planned_grids, config.vision.patch_dim), record_id
    text = len(example.tokens) - example.num_patches
    if text != planned_text:
        raise ValueError(
            f"record {record_id!r} of {source!r} has {text} text tokens, its index says {planned_text}: "
            "it was written by another version of this program; import the dataset again"
        )
    return example, record_id


def _read(dataset: Dataset, i: int) -> Record:
    """Read record ``i``, trying again after an I/O error: on network storage most of them pass."""
    wait = IO_FIRST_WAIT_S
    for attempt in range(1, IO_ATTEMPTS + 1):
        try:
            return dataset[i]
        except OSError as error:
            if attempt == IO_ATTEMPTS:
                raise OSError(
                    f"record {i} of {dataset.directory}: {attempt} attempts to read it failed: {error}"
                ) from error
            _log.warning("record %d of %s: %s; trying again in %.1f s", i, dataset.directory, error, wait)
            time.sleep(wait)
            wait *= 2
    raise AssertionError("unreachable")


# ---------------------------------------------------------------------------------------------------------------------
# Which rows a host makes, and how they reach its devices.


class RowSharding(Protocol):
    """What is asked of a ``jax.sharding.Sharding``."""

    @property
    def device_set(self) -> Collection[Any]: ...

    def addressable_devices_indices_map(self, global_shape: tuple[int, ...]) -> Mapping[Any, Any]: ...


def rows_of_process(sharding: RowSharding, batch_rows: int) -> list[int]:
    """The rows of a [batch_rows, T] array that this process's devices hold, ascending.

    Several devices may hold one row (tensor or context parallelism), and so may several hosts: each then makes it.
    """
    # As many columns as devices divide evenly however the sharding splits the columns.
    indices = sharding.addressable_devices_indices_map((batch_rows, len(sharding.device_set))).values()
    return sorted({row for index in indices for row in range(batch_rows)[index[0]]})


def to_device(batch: Batch, sharding: jax.sharding.Sharding | Batch, batch_rows: int) -> Batch:
    """This process's rows of a batch as global arrays of ``batch_rows`` rows.

    Args:
      batch: NumPy, rows as ``rows_of_process`` lists them.
      sharding: one for all fields, or a Batch of one per field. All split the rows alike.
      batch_rows: B.
    """
    shardings = sharding if isinstance(sharding, Batch) else jax.tree.map(lambda _: sharding, batch)
    local = {row: j for j, row in enumerate(rows_of_process(shardings.tokens, batch_rows))}

    def put(array: np.ndarray, where: jax.sharding.Sharding) -> jax.Array:
        def shard(index: Any) -> np.ndarray:  # a slice per axis
            rows = [local[row] for row in range(batch_rows)[index[0]]]
            return array[(slice(rows[0], rows[-1] + 1), *index[1:])]

        return jax.make_array_from_callback((batch_rows, *array.shape[1:]), where, shard)

    return jax.tree.map(put, batch, shardings)
