"""Encode records as ``Example``: tokens, patches, and the group that metrics are split by."""

import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np

from phivision_jax.config import matching
from phivision_jax.data.quarantine import BadRecord
from phivision_jax.data.records import MODES, TASKS, Mode, Record, join_tasks, mode_of
from phivision_jax.data.store.dataset import Dataset
from phivision_jax.images.decode import open_image, to_rgb
from phivision_jax.images.layout import ImageLayout, ImageSize
from phivision_jax.io.messages import shorten
from phivision_jax.processor import Processor
from phivision_jax.rows import Example
from phivision_jax.text.constants import IGNORE, PLACEHOLDER

GROUP_NAMES: tuple[str, ...] = tuple(f"{mode}/{task}" for mode in MODES for task in TASKS)
"""Name of each group id, for metrics: "think/general", "think/math", …, "nothink/general", …"""


def group_names(datasets: Iterable[Dataset]) -> tuple[str, ...]:
    """``GROUP_NAMES``, and the groups of the other tasks in datasets."""
    tasks = join_tasks(dataset.index.task_names for dataset in datasets)[len(TASKS) :]
    return GROUP_NAMES + tuple(f"{mode}/{task}" for mode in MODES for task in tasks)


def group_id(mode: Mode, task: str, groups: Sequence[str] = GROUP_NAMES) -> int:
    """The ``Batch.group_ids`` value of an example: its mode and task, as an index into ``groups``."""
    return groups.index(f"{mode}/{task}")


def group_weights(rules: Sequence[tuple[str, float]], groups: Sequence[str] = GROUP_NAMES) -> np.ndarray:
    """[groups] f32: factors for the loss weights of examples, by group.

    Args:
      rules: (regular expression, weight) pairs tried in order on a group's name, like "think/math"; the first that
        matches anywhere counts, and 1 where none does. 0 leaves a group out of the loss.
      groups: all names.

    Raises:
      ValueError: for a pattern that is not a regular expression or matches no group; for a negative weight; when every
        group would be left out.
    """
    weights = dict.fromkeys(groups, 1.0)
    tasks = dict.fromkeys(name.partition("/")[2] for name in groups)
    what = f"mode and task; modes are {', '.join(MODES)}, tasks are {', '.join(tasks)}"
    for pattern, weight in reversed(rules):
        matched = matching("data.loss_weights", pattern, groups, what)
        if not 0 <= weight < math.inf:
            shown = shorten(repr(pattern))
            raise ValueError(f"data.loss_weights: the weight of {shown} must be 0 or more, not {weight}")
        weights |= dict.fromkeys(matched, weight)
    factors = np.array(list(weights.values()), np.float32)
    if not factors.any():
        raise ValueError("data.loss_weights leave nothing to learn: every mode and task has weight 0")
    return factors


def encode_record(
    record: Record, processor: Processor, max_patches: int | None = None, groups: Sequence[str] | None = None
) -> Example:
    """Decode a record's images, lay them out, and encode the conversation.

    Args:
      record: with its images as bytes or paths.
      processor: of the model.
      max_patches: limit per image, where a plan allows fewer patches than the processor does.
      groups: names of the groups, among them the record's; default: ``GROUP_NAMES``, and 0 for any other task.

    Raises:
      BadRecord: for a record that cannot be encoded: a broken image, markers and images that do not match, an answer
        that contradicts its mode. The same record fails in the same way each time.
      OSError: when an image's file cannot be read.
    """
    mode, reason = mode_of(record), "image-broken"
    try:
        images = [to_rgb(open_image(image, f"image {i}")) for i, image in enumerate(record.images)]
        reason = "fields"
        group = group_id(mode, record.task, groups or GROUP_NAMES) if groups or record.task in TASKS else 0
        return processor.encode(record.messages, images, mode=mode, group=group, max_patches=max_patches)
    except ValueError as error:
        raise BadRecord(reason, str(error)) from error


def placeholder_example(text_tokens: int, images: Sequence[ImageSize], layout: ImageLayout) -> Example:
    """The stand-in for a record that cannot be encoded: of its planned size, empty and without loss.

    It takes the planned tokens and patches, so that every other example of the row stays in its place.
    """
    tokens = [image.tokens for image in images]
    length = text_tokens + sum(tokens)
    return Example(
        tokens=np.full(length, PLACEHOLDER, np.int32),
        labels=np.full(length, IGNORE, np.int32),
        image_starts=tuple(itertools.accumulate(tokens, initial=0))[:-1],
        images=tuple(layout.blank(image) for image in images),
    )
