"""Packing: which examples share a row, on budgets of tokens and patches, with attention work spread evenly.

A row has T text positions (image tokens count) and R vision rows of P patches. Examples are taken from the largest to
the smallest. As many rows as the sums of both budgets need are open from the start. A large example (more than T/3
tokens) goes to the row with the least attention work so far, Σ length², among those with room for it, so that rows come
to hold one long example and some shorter ones each. Small examples then fill the gaps: each goes to the row with the
fewest positions left (best fit). An example without a row that has room opens a new one.

    T = 10, R = 1, P = 6                       ▢ image token  ▇ text token          positions, patches left
    a: 4 patches and 3 text tokens    b first (all of P)         row 0  ▢▢▢▢▢▢▇▇▇▇  b d    0, 0
    b: 6 patches                      a has room in row 1 alone  row 1  ▢▢▢▢▇▇▇▇▇▇  a c    0, 2
    c: 3 text tokens                  d joins b: 6² < 7²
    d: 4 text tokens                  c fits row 1 alone

Where that costs rows, plain best-fit-decreasing is taken (``benchmarks/packing.py`` prints both).

Within a row, images are placed in vision rows by the same function in the same order as ``rows.fill_rows`` places them,
so a planned row always fits, also with R > 1.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from phivision_jax.batch import RowShape
from phivision_jax.rows import fullest_vision_row


class Lengths(NamedTuple):
    """The sizes of N examples with I images in all."""

    tokens: np.ndarray
    """[N] i64: tokens of each example, those of its images included."""
    image_patches: np.ndarray
    """[I] i64: patches of each image, examples in order."""
    offsets: np.ndarray
    """[N + 1] i64: example i owns ``image_patches[offsets[i]:offsets[i + 1]]``."""

    @property
    def patches(self) -> np.ndarray:
        """[N] i64: patches of each example."""
        return np.diff(np.concatenate([[0], np.cumsum(self.image_patches, dtype=np.int64)])[self.offsets])

    def images_of(self, i: int) -> np.ndarray:
        """Patches of each image of example i, as a view."""
        return self.image_patches[self.offsets[i] : self.offsets[i + 1]]


def place(used: Sequence[int], images: Iterable[int], num_patches: int) -> list[int] | None:
    """``used`` patches of each vision row after an example's images are placed; None when one does not fit."""
    after = list(used)
    for patches in images:
        if (r := fullest_vision_row(after, patches, num_patches)) is None:
            return None
        after[r] += patches
    return after


def pack(examples: np.ndarray, lengths: Lengths, shape: RowShape) -> tuple[np.ndarray, np.ndarray]:
    """Pack examples [n] (indices into ``lengths``; each must fit an empty row) into rows.

    Returns:
      ``(examples, row_offsets)``: [n] the same indices, row after row in the order in which they fill it, and
      [rows + 1] where each row begins.
    """
    spread = _pack(examples, lengths, shape, spread_work=True)
    rows = len(spread[1]) - 1
    if rows <= _ROWS_FOR_BALANCE * _least_rows(examples, lengths, shape):
        return spread
    tight = best_fit_decreasing(examples, lengths, shape)
    return spread if rows <= _ROWS_FOR_BALANCE * (len(tight[1]) - 1) else tight


def best_fit_decreasing(examples: np.ndarray, lengths: Lengths, shape: RowShape) -> tuple[np.ndarray, np.ndarray]:
    """Like ``pack``, without regard to attention work."""
    return _pack(examples, lengths, shape, spread_work=False)


_ROWS_FOR_BALANCE = 1.005
"""Spreading the work may cost half a percent more rows; beyond that (T near the longest examples) rows count more."""


def _least_rows(examples: np.ndarray, lengths: Lengths, shape: RowShape) -> int:
    """A lower bound: the rows that the sums of both budgets need."""
    by_tokens = -(-int(lengths.tokens[examples].sum()) // shape.length)
    by_patches = -(-int(lengths.patches[examples].sum()) // max(shape.total_patches, 1))
    return min(max(by_tokens, by_patches), len(examples))


def _pack(
    examples: np.ndarray, lengths: Lengths, shape: RowShape, *, spread_work: bool
) -> tuple[np.ndarray, np.ndarray]:
    n, length, total_patches = len(examples), shape.length, shape.total_patches
    tokens, patches = lengths.tokens[examples], lengths.patches[examples]
    # By the larger share of the two budgets, compared as integers: shares rounded to floats could tie by accident.
    order = np.argsort(-np.maximum(tokens * max(total_patches, 1), patches * length), kind="stable")
    examples, tokens, patches = examples[order], tokens[order], patches[order]
    num_rows = _least_rows(examples, lengths, shape) if spread_work else 0
    small = length // 3 if spread_work else length

    row_of = np.empty(n, np.int64)
    # Positions left; patches left in all; patches left in the emptiest vision row, since an image is never split.
    room, left, widest = np.full(n, length), np.full(n, total_patches), np.full(n, shape.num_patches)
    work, score = np.zeros(n, np.int64), np.empty(n, np.int64)
    used = [[0] * shape.vision_rows for _ in range(num_rows)]
    never = np.iinfo(np.int64).max
    for i, (example, t, p) in enumerate(zip(examples.tolist(), tokens.tolist(), patches.tolist(), strict=True)):
        images, scores = lengths.images_of(example).tolist(), score[:num_rows]
        np.copyto(scores, (room if t <= small else work)[:num_rows])
        scores[room[:num_rows] < t] = never
        if p:
            scores[(left[:num_rows] < p) | (widest[:num_rows] < max(images))] = never
        after, j = None, num_rows
        while num_rows and after is None:
            j = int(scores.argmin())
            if scores[j] == never:
                break
            after = place(used[j], images, shape.num_patches)
            scores[j] = never  # if it did not fit: several images, and room for each but not for all
        if after is None:
            j = num_rows
            after = place([0] * shape.vision_rows, images, shape.num_patches)
            if after is None or t > length:
                raise ValueError(f"an example of {t} tokens and images of {images} patches does not fit {shape}")
            used.append(after)
            num_rows += 1
        row_of[i], used[j] = j, after
        room[j] -= t
        left[j] -= p
        widest[j] = shape.num_patches - min(after)
        work[j] += t * t
    by_row = np.argsort(row_of, kind="stable")
    counts = np.bincount(row_of, minlength=num_rows)
    return examples[by_row], np.concatenate([[0], np.cumsum(counts[counts > 0])])


def attention_work(examples: np.ndarray, row_offsets: np.ndarray, lengths: Lengths) -> np.ndarray:
    """[rows] i64: Σ length² over the examples of each row, the cost of its attention."""
    sums = np.concatenate([[0], np.cumsum(lengths.tokens[examples] ** 2)])
    return np.diff(sums[row_offsets])


def balance(work: np.ndarray, shuffled: np.ndarray, batch_rows: int, pending: int) -> np.ndarray:
    """Order a window's rows so that those of one step have about the same attention work.

    All devices wait for the row with the most work. Rows are sorted by work in levels of a tenth, at random within one,
    split into steps, and the steps are shuffled. Rows that share a step with a neighbouring window are taken from the
    middle of the order, as the neighbour's are.

    Args:
      work: [rows] of each row.
      shuffled: [rows] the rows in a random order.
      batch_rows: B.
      pending: rows that the first step already has from the window before; 0 at a step's beginning.

    Returns:
      [rows] the rows in order.
    """
    level = np.searchsorted(_work_levels(int(work.max(initial=1))), work[shuffled])
    order = shuffled[np.argsort(level, kind="stable")]
    head = min(-pending % batch_rows, len(order))
    num_steps = (len(order) - head) // batch_rows
    num_shared = len(order) - num_steps * batch_rows  # with the step before and the step after
    middle = (len(order) - num_shared) // 2
    shared, own = order[middle : middle + num_shared], np.delete(order, slice(middle, middle + num_shared))
    steps = own.reshape(num_steps, batch_rows)
    place_of = np.argsort(shuffled)  # the inverse permutation: a random place for each step, by its first row
    steps = steps[np.argsort(place_of[steps[:, 0]])]
    return np.concatenate([shared[:head], steps.reshape(-1), shared[head:]])


def _work_levels(most: int) -> np.ndarray:
    """Integers from 1 to above ``most``, each a tenth above the last: exact, so that every machine sorts alike."""
    levels = [1]
    while levels[-1] < most:
        levels.append(levels[-1] + max(levels[-1] // 10, 1))
    return np.array(levels)
