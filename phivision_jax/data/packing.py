"""Which examples share a row: best-fit-decreasing on two budgets at once.

A row has T text columns (image columns count) and R vision rows of P patches. Examples are taken from the largest to
the smallest; each goes to the row with the fewest columns left among those that still take it, or opens a new one:

    T = 10, R = 1, P = 6                       ▢ image column  ▇ text column       columns, patches left
    a: 4 patches and 3 text tokens    b first (all of P)        row 0  ▢▢▢▢▢▢▇▇▇▇  b d    0, 0
    b: 6 patches                      a finds no room for 7     row 1  ▢▢▢▢▇▇▇▇▇▇  a c    0, 2
    c: 3 text tokens                  d fills row 0 (4 left)
    d: 4 text tokens                  c fills row 1 (3 left)

Within a row, images take vision rows exactly as ``batch.fill_rows`` places them (the same function in the same order),
so a planned row always fits, with R > 1 too.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from phivision_jax.batch import fullest_vision_row


@dataclasses.dataclass(frozen=True)
class Capacity:
    """What one row takes."""

    length: int
    """T: text columns, image columns included."""
    vision_rows: int
    """R."""
    num_patches: int
    """P, of each vision row; an image lies within one."""

    def __post_init__(self) -> None:
        if self.length < 1 or self.vision_rows < 1 or self.num_patches < 0:
            raise ValueError(f"a row needs length >= 1, vision_rows >= 1 and num_patches >= 0, not {self}")


@dataclasses.dataclass(frozen=True)
class Lengths:
    """The sizes of N examples holding I images in all."""

    columns: np.ndarray
    """[N] i64: text columns, image columns included."""
    image_patches: np.ndarray
    """[I] i64: patches of each image, examples in order."""
    offsets: np.ndarray
    """[N + 1] i64: example i owns ``image_patches[offsets[i]:offsets[i + 1]]``."""

    @property
    def patches(self) -> np.ndarray:
        """[N] i64: patches of each example."""
        return np.diff(np.concatenate([[0], np.cumsum(self.image_patches, dtype=np.int64)])[self.offsets])


def place(used: list[int], images: list[int], num_patches: int) -> list[int] | None:
    """``used`` patches of each vision row after an example's images are placed; None when one does not fit."""
    after = list(used)
    for patches in images:
        r = fullest_vision_row(after, patches, num_patches)
        if r is None:
            return None
        after[r] += patches
    return after


def pack(examples: np.ndarray, lengths: Lengths, capacity: Capacity) -> tuple[np.ndarray, np.ndarray]:
    """Pack the ``examples`` [n] (numbers into ``lengths``; each must fit an empty row) into rows.

    Returns:
      ``(examples, row_offsets)``: [n] the same numbers, row after row in the order in which they fill it, and
      [rows + 1] where each row begins.
    """
    n, num_patches = len(examples), capacity.num_patches
    columns = lengths.columns[examples]
    begin, end = lengths.offsets[examples], lengths.offsets[examples + 1]
    sums = np.concatenate([[0], np.cumsum(lengths.image_patches, dtype=np.int64)])
    patches = sums[end] - sums[begin]
    # Size is the larger share of the two budgets, compared as integers: shares rounded to floats could tie by accident.
    size = np.maximum(columns * max(capacity.vision_rows * num_patches, 1), patches * capacity.length)
    order = np.argsort(-size, kind="stable")
    examples, columns, patches, begin, end = (a[order] for a in (examples, columns, patches, begin, end))
    # The least that any example from here on needs: a row with less left is closed and no longer searched.
    least = np.minimum.accumulate(columns[::-1])[::-1]

    row_of = np.empty(n, np.int64)
    used: list[list[int]] = []
    # Open rows: columns left, patches left, row number. Kept in the order in which they were opened.
    room, left, number = (np.empty(n, np.int32) for _ in range(3))
    score = np.empty(n, np.int32)
    opened, closed_at = 0, 0
    never = np.int32(np.iinfo(np.int32).max)
    image_patches = lengths.image_patches
    for i, (t, p, b, e) in enumerate(
        zip(columns.tolist(), patches.tolist(), begin.tolist(), end.tolist(), strict=True)
    ):
        if i - closed_at >= 256:
            keep = np.flatnonzero(room[:opened] >= least[i])
            for array in (room, left, number):
                array[: len(keep)] = array[keep]
            opened, closed_at = len(keep), i
        images = image_patches[b:e].tolist()
        scores = score[:opened]
        np.copyto(scores, room[:opened])
        scores[room[:opened] < t] = never
        if p:
            scores[left[:opened] < p] = never
        after = None
        while opened:
            j = int(scores.argmin())
            if scores[j] == never:
                break
            after = place(used[number[j]], images, num_patches) if p else used[number[j]]
            if after is not None:
                break
            scores[j] = never  # room enough in all, but not in any one vision row
        if after is None:
            j = opened
            after = place([0] * capacity.vision_rows, images, num_patches)
            if after is None or t > capacity.length:
                raise ValueError(f"an example of {t} columns and images of {images} patches does not fit {capacity}")
            room[j], left[j], number[j] = capacity.length, capacity.vision_rows * num_patches, len(used)
            used.append(after)
            opened += 1
        row_of[i] = number[j]
        used[number[j]] = after
        room[j] -= t
        left[j] -= p
    by_row = np.argsort(row_of, kind="stable")
    counts = np.bincount(row_of, minlength=len(used))
    return examples[by_row], np.concatenate([[0], np.cumsum(counts)])
