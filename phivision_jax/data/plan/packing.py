"""Which examples share a row: packing on two budgets at once, with attention work spread evenly.

A row has T text columns (image columns count) and R vision rows of P patches. Examples are taken from the largest to
the smallest. As many rows as the sums of both budgets need are open from the start. Large examples (more than T/3
columns) go where there is the least attention work so far, Σ length², among the rows that still take them, so that rows
come to hold one long example and some shorter ones rather than long ones here and short ones there. Small examples then
fill the gaps: each goes to the row with the fewest columns left (best fit). What fits nowhere opens a new row.

    T = 10, R = 1, P = 6                       ▢ image column  ▇ text column       columns, patches left
    a: 4 patches and 3 text tokens    b first (all of P)         row 0  ▢▢▢▢▢▢▇▇▇▇  b d    0, 0
    b: 6 patches                      a has room in row 1 alone  row 1  ▢▢▢▢▇▇▇▇▇▇  a c    0, 2
    c: 3 text tokens                  d joins b: 6² < 7²
    d: 4 text tokens                  c fits row 1 alone

Where that costs rows, plain best-fit-decreasing is taken (``benchmarks/packing.py`` prints both).

Within a row, images take vision rows exactly as ``batch.fill_rows`` places them (the same function in the same order),
so a planned row always fits, with R > 1 too.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from phivision_jax.batch import RowShape
from phivision_jax.rows import fullest_vision_row


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


def pack(examples: np.ndarray, lengths: Lengths, capacity: RowShape) -> tuple[np.ndarray, np.ndarray]:
    """Pack the ``examples`` [n] (numbers into ``lengths``; each must fit an empty row) into rows.

    Returns:
      ``(examples, row_offsets)``: [n] the same numbers, row after row in the order in which they fill it, and
      [rows + 1] where each row begins.
    """
    spread = _pack(examples, lengths, capacity, spread_work=True)
    if _rows(spread) <= _ROWS_FOR_BALANCE * _least_rows(examples, lengths, capacity):
        return spread
    tight = best_fit_decreasing(examples, lengths, capacity)
    return spread if _rows(spread) <= _ROWS_FOR_BALANCE * _rows(tight) else tight


def best_fit_decreasing(examples: np.ndarray, lengths: Lengths, capacity: RowShape) -> tuple[np.ndarray, np.ndarray]:
    """As ``pack``, with no eye on attention work."""
    return _pack(examples, lengths, capacity, spread_work=False)


_ROWS_FOR_BALANCE = 1.005
"""Spreading the work may cost half a percent more rows; past that (T near the longest examples) rows count more."""


def _rows(packed: tuple[np.ndarray, np.ndarray]) -> int:
    return len(packed[1]) - 1


def _least_rows(examples: np.ndarray, lengths: Lengths, capacity: RowShape) -> int:
    """As many rows as the sums of both budgets need, at least."""
    patches = max(capacity.total_patches, 1)
    by_columns = -(-int(lengths.columns[examples].sum()) // capacity.length)
    return min(max(by_columns, -(-int(lengths.patches[examples].sum()) // patches)), len(examples))


def _pack(
    examples: np.ndarray, lengths: Lengths, capacity: RowShape, *, spread_work: bool
) -> tuple[np.ndarray, np.ndarray]:
    n, length, total_patches = len(examples), capacity.length, capacity.total_patches
    columns = lengths.columns[examples]
    begin, end = lengths.offsets[examples], lengths.offsets[examples + 1]
    patches = lengths.patches[examples]
    # Size is the larger share of the two budgets, compared as integers: shares rounded to floats could tie by accident.
    order = np.argsort(-np.maximum(columns * max(total_patches, 1), patches * length), kind="stable")
    examples, columns, patches, begin, end = (a[order] for a in (examples, columns, patches, begin, end))
    opened = _least_rows(examples, lengths, capacity) if spread_work else 0
    small = length // 3 if spread_work else length

    row_of = np.empty(n, np.int64)
    # Columns left; patches left in all; patches left in the emptiest vision row, since an image lies within one.
    room, left, widest = np.full(n, length), np.full(n, total_patches), np.full(n, capacity.num_patches)
    work = np.zeros(n, np.int64)
    score = np.empty(n, np.int64)
    used = [[0] * capacity.vision_rows for _ in range(opened)]
    never = np.iinfo(np.int64).max
    image_patches = lengths.image_patches
    for i, (t, p) in enumerate(zip(columns.tolist(), patches.tolist(), strict=True)):
        images = image_patches[begin[i] : end[i]].tolist()
        scores = score[:opened]
        np.copyto(scores, (room if t <= small else work)[:opened])
        scores[room[:opened] < t] = never
        if p:
            scores[(left[:opened] < p) | (widest[:opened] < max(images))] = never
        after, j = None, opened
        while opened and after is None:
            j = int(scores.argmin())
            if scores[j] == never:
                break
            after = place(used[j], images, capacity.num_patches)
            scores[j] = never  # if it did not fit: several images, and room for each but not for all
        if after is None:
            j = opened
            after = place([0] * capacity.vision_rows, images, capacity.num_patches)
            if after is None or t > length:
                raise ValueError(f"an example of {t} columns and images of {images} patches does not fit {capacity}")
            used.append(after)
            opened += 1
        row_of[i], used[j] = j, after
        room[j] -= t
        left[j] -= p
        widest[j] = capacity.num_patches - min(after)
        work[j] += t * t
    by_row = np.argsort(row_of, kind="stable")
    counts = np.bincount(row_of, minlength=opened)
    return examples[by_row], np.concatenate([[0], np.cumsum(counts[counts > 0])])


def attention_work(examples: np.ndarray, row_offsets: np.ndarray, lengths: Lengths) -> np.ndarray:
    """[rows] i64: Σ length² over the examples of each row, what its attention costs."""
    sums = np.concatenate([[0], np.cumsum(lengths.columns[examples] ** 2)])
    return np.diff(sums[row_offsets])


def balance(work: np.ndarray, shuffled: np.ndarray, batch_rows: int, pending: int) -> np.ndarray:
    """An order of a window's rows in which those of one step have about the same attention work.

    All devices wait for the row with the most work in it. Rows are sorted by work in steps of a tenth, at random inside
    one, cut into steps, and the steps are shuffled. The rows that share a step with a neighbouring window are taken
    from the middle, where the neighbour takes its own.

    Args:
      work: [rows] of each row.
      shuffled: [rows] the rows in a random order.
      batch_rows: B.
      pending: how many rows the step holds that this window begins in the middle of; 0 at a step's beginning.

    Returns:
      [rows] the rows in order.
    """
    level = np.searchsorted(_work_levels(int(work.max(initial=1))), work[shuffled])
    order = shuffled[np.argsort(level, kind="stable")]
    head = min(-pending % batch_rows, len(order))
    steps = (len(order) - head) // batch_rows
    outside = len(order) - steps * batch_rows  # of the step before and the step behind
    middle = (len(order) - outside) // 2
    shared, own = order[middle : middle + outside], np.delete(order, slice(middle, middle + outside))
    cut = own.reshape(steps, batch_rows)
    place_of = np.argsort(shuffled)  # the inverse permutation: a random place for each step, by its first row
    cut = cut[np.argsort(place_of[cut[:, 0]])]
    return np.concatenate([shared[:head], cut.reshape(-1), shared[head:]])


def _work_levels(most: int) -> np.ndarray:
    """1, 2, 3, … each a tenth above the last, beyond ``most``: integers, so that every machine sorts alike."""
    levels = [1]
    while levels[-1] < most:
        levels.append(levels[-1] + max(levels[-1] // 10, 1))
    return np.array(levels)
