"""From a record to an ``Example``: the processor's tokens and patches, and the group that metrics are split by."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from phivision_jax.batch import IGNORE, PLACEHOLDER, Example, PatchedImage
from phivision_jax.data.quarantine import BadRecord
from phivision_jax.data.records import MODES, TASKS, Mode, Record, mode_of
from phivision_jax.images.decode import open_image, to_rgb

if TYPE_CHECKING:
    from phivision_jax.processor import Processor

GROUP_NAMES: tuple[str, ...] = tuple(f"{mode}/{task}" for mode in MODES for task in TASKS)
"""Name of each group id, for metrics: "think/general", "think/math", …, "nothink/general", …"""


def group_id(mode: Mode, task: str) -> int:
    """The ``Batch.group_ids`` value of an example: mode × task, as a position in ``GROUP_NAMES``."""
    return MODES.index(mode) * len(TASKS) + TASKS.index(task)


def encode_record(record: Record, processor: Processor, max_patches: int | None = None) -> Example:
    """Decode the images, resize them to patches, and lay out the conversation.

    Args:
      record: with its images as bytes or paths.
      processor: of the model.
      max_patches: per image, where a plan allows fewer than the processor does.

    Raises:
      BadRecord: for a record that cannot be encoded: a broken image, markers and images that do not match, an answer
        that is not of its mode. The same record fails the same way each time.
      OSError: when an image's file cannot be read.
    """
    mode = mode_of(record)
    pictures = []
    for i, image in enumerate(record.images):
        try:
            pictures.append(to_rgb(open_image(image, f"image {i}")))
        except ValueError as error:
            raise BadRecord("image-broken", str(error)) from error
    try:
        return processor.encode(
            record.messages, pictures, mode=mode, group=group_id(mode, record.task), max_patches=max_patches
        )
    except ValueError as error:
        raise BadRecord("fields", str(error)) from error


def hole(text_tokens: int, grids: Sequence[tuple[int, int]], patch_dim: int) -> Example:
    """Stands for a record that cannot be encoded: the size that was planned for it, nothing in it, no loss.

    It keeps the planned columns and patches, so that every other example of the row stays where it is.
    """
    counts = [rows * columns for rows, columns in grids]
    length = text_tokens + sum(counts)
    return Example(
        tokens=np.full(length, PLACEHOLDER, np.int32),
        labels=np.full(length, IGNORE, np.int32),
        image_starts=tuple(itertools.accumulate(counts, initial=0))[:-1],
        images=tuple(
            PatchedImage(np.zeros((count, patch_dim), np.uint8), grid)
            for count, grid in zip(counts, grids, strict=True)
        ),
    )
