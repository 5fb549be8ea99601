"""From a plan to batches: each host makes the rows of its devices, on threads, in the plan's order.

    step s ──► plan.rows(s, B) ──► this host's rows ──► read, decode, encode ──► fill_rows ──► Batch ──► to_device
                                   (from the sharding)     a placeholder for a bad record

A step depends on the plan alone, so iteration can begin at any step, on any number of hosts, and gives exactly the
batches of an uninterrupted run. A record that cannot be encoded is replaced by a placeholder of its planned size and
listed in ``BatchInfo.failed``; reading is retried after an I/O error.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import grain
import numpy as np

from phivision_jax.batch import Batch
from phivision_jax.data.feed import encode
from phivision_jax.data.plan.plan import MAX_SOURCES, Plan
from phivision_jax.data.quarantine import BadRecord, Quarantined
from phivision_jax.io.retry import retry
from phivision_jax.rows import Example, fill_rows

if TYPE_CHECKING:
    import jax

    from phivision_jax.data.store.dataset import Dataset
    from phivision_jax.processor import Processor

PREFETCH = 4
"""Steps that may be ready ahead of the consumer."""
READ_ATTEMPTS = 4
READ_FIRST_WAIT_S = 0.5
"""Seconds before the second attempt to read a record; doubled each time."""

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class BatchInfo:
    """The records behind the rows of a batch, for the host."""

    step: int
    record_ids: tuple[tuple[str, ...], ...]
    """Record ids of each of this host's rows; the n-th of a row is segment n + 1."""
    failed: tuple[Quarantined, ...]
    """Records that could not be encoded, so that placeholders take their places."""


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
    groups: Sequence[str] | None = None,
    num_threads: int = 2,
) -> Iterator[tuple[Batch, BatchInfo]]:
    """The plan's batches from ``start_step`` to ``end_step`` or its end, as NumPy.

    Args:
      datasets: the datasets of the plan, in its order.
      plan: rows, and their shape.
      processor: with the fingerprint of the plan's.
      batch_rows: B, rows of a step over all hosts.
      rows_here: the rows to make, in this order; default: all B. ``rows_of_process`` gives a host's.
      start_step: first step.
      end_step: the step after the last.
      loss_weights: [groups] f32 factors for the loss weights (``encode.group_weights``).
      groups: names of the groups (``encode.group_names``); default: those of the datasets.
      num_threads: steps that are made at the same time; 0 makes them in the caller's thread.

    Raises:
      ValueError: when plan, datasets and processor do not belong together, or a record is not as long as planned.
      IndexError: when ``start_step`` is beyond the plan's end.
    """
    if plan.inputs["sources"] != [dataset.hash for dataset in datasets]:
        given, names = ", ".join(str(dataset.directory) for dataset in datasets), ", ".join(plan.inputs["names"])
        problem = f"the plan is from other datasets than {given}; it was made from {names}"
        raise ValueError(f"{problem}: name these, in this order, or make it again")
    records = np.array([*map(len, datasets), *[0] * MAX_SOURCES], np.uint32)
    offsets = plan.row_offsets
    # A plan may be forged together with its hash.
    sound = [*offsets[:1], *offsets[-1:]] == [0, len(plan.examples)] and np.all(offsets[:-1] <= offsets[1:])
    if not (sound and np.all(plan.examples < records[plan.sources])):
        raise ValueError("the plan names records that do not exist; make it again")
    if plan.inputs["processor"] != processor.fingerprint:
        raise ValueError("the plan was made with another tokenizer, chat template or image layout; make it again")
    steps = plan.num_steps(batch_rows)
    if not 0 <= start_step <= steps:
        raise IndexError(f"start_step {start_step} of a plan with {steps} steps of {batch_rows} rows")
    groups = encode.group_names(datasets) if groups is None else groups
    end = steps if end_step is None else min(end_step, steps)

    def load(step: int) -> tuple[Batch, BatchInfo]:
        planned, failed = plan.rows(step, batch_rows), list[Quarantined]()

        rows = [
            [_load_example(datasets, plan, s, i, processor, groups, failed) for s, i in planned[j].tolist()]
            for j in (range(batch_rows) if rows_here is None else rows_here)
        ]
        batch = fill_rows([[example for example, _ in row] for row in rows], plan.row_shape, processor.config)
        if loss_weights is not None:
            batch = batch._replace(loss_weights=batch.loss_weights * loss_weights[batch.group_ids])
        record_ids = tuple(tuple(record_id for _, record_id in row) for row in rows)
        return batch, BatchInfo(step, record_ids, tuple(failed))

    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=PREFETCH if num_threads else 0)
    return iter(grain.MapDataset.range(start_step, end).map(load).to_iter_dataset(options))


def _load_example(
    datasets: Sequence[Dataset],
    plan: Plan,
    s: int,
    i: int,
    processor: Processor,
    groups: Sequence[str],
    failed: list[Quarantined],
) -> tuple[Example, str]:
    """Record ``i`` of dataset ``s`` encoded, or its placeholder (then it is in ``failed``); and the record's id."""
    dataset, max_patches = datasets[s], plan.patch_limits.get((s, i))
    planned_text = int(dataset.index.text_tokens[i])
    planned = [processor.layout.measure(*size, max_patches) for size in dataset.index.sizes_of(i)]
    record_id, source = f"{dataset.directory.name}:{i}", dataset.directory.name
    try:
        # On network storage most errors pass.
        place = f"record {i} of {dataset.directory}"
        record = retry(lambda: dataset[i], READ_ATTEMPTS, READ_FIRST_WAIT_S, _log.warning, place)
        record_id, source = record.id, record.source
        example = encode.encode_record(record, processor, max_patches, groups)
        if (found := [image.size for image in example.images]) != planned:
            grids = [[size.grids for size in sizes] for sizes in (found, planned)]
            raise BadRecord("image-broken", f"images decode to grids {grids[0]}, planned were {grids[1]}")
    except OSError as error:
        raise OSError(f"{place}: {READ_ATTEMPTS} attempts to read it failed: {error}") from error
    except BadRecord as error:
        failed.append(Quarantined(record_id, source, error.reason, str(error), f"{dataset.directory}, record {i}"))
        return encode.placeholder_example(planned_text, planned, processor.layout), record_id
    if example.text_tokens != planned_text:
        counts = f"{example.text_tokens} text tokens, but {planned_text} in its index"
        remedy = "another version of this program wrote it; import the dataset again"
        raise ValueError(f"record {record_id!r:.100} of {source!r:.99} has {counts}: {remedy}")
    return example, record_id


# ---------------------------------------------------------------------------------------------------------------------
# The rows of a host, and their way to its devices.


def rows_of_process(sharding: jax.sharding.Sharding, batch_rows: int) -> list[int]:
    """The rows of a [batch_rows, T] array that this process's devices hold, ascending.

    Several devices may hold one row (tensor or context parallelism), and so may several hosts: each then makes it.
    """
    # A length of the number of devices divides evenly, however the sharding splits it.
    indices = sharding.addressable_devices_indices_map((batch_rows, len(sharding.device_set))).values()
    return sorted({row for index in indices if index for row in range(batch_rows)[index[0]]})


def to_device(batch: Batch, sharding: jax.sharding.Sharding | Batch, batch_rows: int) -> Batch:
    """This process's rows of a batch as global arrays of ``batch_rows`` rows.

    Args:
      batch: NumPy, rows as ``rows_of_process`` lists them.
      sharding: one for all fields, or a Batch of one per field. All split the rows alike.
      batch_rows: B.
    """
    import jax

    def put(array: np.ndarray, where: jax.sharding.Sharding) -> jax.Array:
        return jax.make_array_from_process_local_data(where, array, (batch_rows, *array.shape[1:]))

    shardings = sharding if isinstance(sharding, Batch) else jax.tree.map(lambda _: sharding, batch)
    return jax.tree.map(put, batch, shardings)
