from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phivision_jax.batch import RowShape
from phivision_jax.config import ModelConfig, VisionConfig
from phivision_jax.data.plan import packing
from phivision_jax.data.plan.packing import Lengths, attention_work, balance, best_fit_decreasing, pack, place
from phivision_jax.images.layout import PatchedImage
from phivision_jax.rows import Example, fill_rows
from phivision_jax.text.constants import IGNORE


def lengths_from(text: list[int], images: list[list[int]]) -> Lengths:
    """Lengths of examples from their text tokens and the patches of their images."""
    tokens = [t + sum(p) for t, p in zip(text, images, strict=True)]
    offsets = np.cumsum([0, *map(len, images)])
    return Lengths(np.array(tokens, np.int64), np.array([p for patches in images for p in patches], np.int64), offsets)


def rows_of(lengths: Lengths, shape: RowShape, examples: list[int] | None = None) -> list[list[int]]:
    numbers = np.arange(len(lengths.tokens)) if examples is None else np.array(examples, np.int64)
    packed, offsets = pack(numbers, lengths, shape)
    return [row.tolist() for row in np.split(packed, offsets[1:-1])]


def test_pack_as_in_docstring():
    a, b, c, d = range(4)
    assert rows_of(lengths_from([3, 0, 3, 4], [[4], [6], [], []]), RowShape(10, 1, 6)) == [[b, d], [a, c]]


def test_pack_prefers_fuller_row():
    # 12 leaves 8 positions and 10 leaves 10; 9 fits the second alone and leaves 1. The last 1 fills that row exactly,
    # though the first was opened before it and has room too.
    assert rows_of(lengths_from([12, 10, 9, 1], [[], [], [], []]), RowShape(20, 1, 0)) == [[0], [1, 2, 3]]
    # The fuller row has no patches left: the other one takes it.
    assert rows_of(lengths_from([0, 4, 1], [[6], [2], [2]]), RowShape(10, 1, 6)) == [[0], [1, 2]]


def test_pack_keeps_image_in_one_vision_row():
    # Vision rows of 6 hold 4 + 4; 2 + 2 are left, so an image of 2 still goes in, one of 3 opens a new row.
    assert rows_of(lengths_from([1, 1], [[4, 4], [2]]), RowShape(20, 2, 6)) == [[0, 1]]
    assert rows_of(lengths_from([1, 1], [[4, 4], [3]]), RowShape(20, 2, 6)) == [[0], [1]]
    assert place([4, 4], [2, 2], 6) == [6, 6]
    assert place([4, 4], [2, 2, 1], 6) is None
    assert place([1, 3], [3], 6) == [1, 6]


def test_pack_takes_only_given_examples():
    lengths = lengths_from([5, 5, 5, 5], [[], [], [], []])
    assert rows_of(lengths, RowShape(10, 1, 0), [3, 1]) == [[3, 1]]


@pytest.mark.parametrize("images", [[[7]], [[4, 4, 4]], [[13]]])
def test_pack_rejects_example_larger_than_row(images):
    with pytest.raises(ValueError, match="does not fit"):
        rows_of(lengths_from([1], images), RowShape(40, 2, 6))


@st.composite
def packings(draw):
    shape = RowShape(draw(st.integers(8, 40)), draw(st.integers(1, 3)), draw(st.integers(1, 16)))
    image = st.integers(1, min(shape.num_patches, 8))
    examples = draw(st.lists(st.tuples(st.integers(1, 12), st.lists(image, max_size=3)), min_size=1, max_size=40))
    fitting = [
        (text, images)
        for text, images in examples
        if text + sum(images) <= shape.length and place([0] * shape.vision_rows, images, shape.num_patches) is not None
    ]
    return shape, fitting or [(1, [])]


def example_of(text: int, images: list[int]) -> Example:
    n = text + sum(images)
    return Example(
        tokens=np.zeros(n, np.int32),
        labels=np.full(n, IGNORE, np.int32),
        image_starts=tuple(np.cumsum([0, *images])[:-1].tolist()),
        images=tuple(PatchedImage(np.zeros((p, 3), np.uint8), ((1, p),)) for p in images),
    )


@settings(max_examples=200)
@given(packings())
def test_pack_fits_and_keeps_every_example(case):
    shape, examples = case
    lengths = lengths_from([t for t, _ in examples], [p for _, p in examples])
    rows = rows_of(lengths, shape)
    assert sorted(i for row in rows for i in row) == list(range(len(examples)))
    assert all(rows), "no row is empty"
    # fill_rows raises where positions or a vision row would overflow: what is planned can be laid out.
    batch = fill_rows(
        [[example_of(*examples[i]) for i in row] for row in rows],
        shape,
        ModelConfig(vision=VisionConfig(patch_size=1)),
    )
    assert (batch.segment_ids > 0).sum() == lengths.tokens.sum()
    assert (batch.patch_segments > 0).sum() == lengths.patches.sum()
    # An image is one run of one vision row.
    for row in batch.patch_segments.reshape(-1, shape.num_patches):
        used = row[row > 0]
        assert (np.diff(used) >= 0).all() and (row[len(used) :] == 0).all()


@pytest.mark.parametrize("vision_rows, num_patches", [(1, 7168), (2, 3840)])
def test_pack_padding_of_mixed_lengths(vision_rows, num_patches):
    """The mix of the design (about 1,800 patches and 700 text tokens per example) at T = 8,192."""
    rng = np.random.default_rng(0)
    per_example = rng.choice([0, 1, 1, 1, 1, 2], 16_384)
    offsets = np.concatenate([[0], np.cumsum(per_example)])
    patches = np.clip(rng.lognormal(7.4, 0.5, offsets[-1]), 256, 3600).astype(np.int64)
    text = np.clip(rng.lognormal(6.2, 0.9, 16_384), 20, 4000).astype(np.int64)
    lengths = Lengths(text, patches, offsets)
    lengths = Lengths(text + lengths.patches, patches, offsets)
    shape = RowShape(8192, vision_rows, num_patches)
    sizes = np.split(patches, offsets[1:-1])
    empty = [0] * vision_rows
    fits = [
        i
        for i in np.flatnonzero(lengths.tokens <= shape.length)
        if place(empty, sizes[i].tolist(), num_patches) is not None
    ]
    packed, row_offsets = pack(np.array(fits), lengths, shape)
    filled = np.add.reduceat(lengths.tokens[packed], row_offsets[:-1])
    assert filled.max() <= 8192
    assert 1 - filled.mean() / 8192 <= 0.01


def test_pack_spreads_attention_work():
    """As many rows as long examples, nearly: two in a row and none in the next is as full as one in each."""
    rng = np.random.default_rng(0)
    kinds = [rng.integers(340, 480, 600), rng.integers(10, 200, 3000)]
    tokens = np.concatenate(kinds).astype(np.int64)
    lengths = Lengths(tokens, np.zeros(0, np.int64), np.zeros(len(tokens) + 1, np.int64))
    packed = {f: f(np.arange(len(tokens)), lengths, RowShape(1000, 1, 0)) for f in (pack, best_fit_decreasing)}
    rows = {f: len(offsets) - 1 for f, (_, offsets) in packed.items()}
    spread = {f: np.std(w) / np.mean(w) for f in packed for w in [attention_work(*packed[f], lengths)]}
    assert spread[pack] < 0.5 * spread[best_fit_decreasing]
    assert rows[pack] <= 1.005 * rows[best_fit_decreasing]


def test_pack_spreading_costs_few_rows():
    """Many examples between a third and a half of a row: two of them leave gaps if the long ones are not paired."""
    rng = np.random.default_rng(1)
    tokens = np.concatenate([rng.integers(340, 660, 900), rng.integers(20, 200, 100)]).astype(np.int64)
    lengths = Lengths(tokens, np.zeros(0, np.int64), np.zeros(1001, np.int64))
    shape = RowShape(1000, 1, 0)
    tight = best_fit_decreasing(np.arange(1000), lengths, shape)
    assert len(pack(np.arange(1000), lengths, shape)[1]) - 1 <= 1.005 * (len(tight[1]) - 1)


def test_attention_work_by_hand():
    lengths = lengths_from([3, 1, 2], [[], [], []])
    assert attention_work(np.array([2, 0, 1]), np.array([0, 1, 3]), lengths).tolist() == [4, 10]


@settings(max_examples=100)
@given(
    work=st.lists(st.integers(1, 10**8), max_size=60),
    batch_rows=st.integers(1, 9),
    pending=st.integers(0, 8),
    seed=st.integers(0, 3),
)
def test_balance_keeps_every_row(work, batch_rows, pending, seed):
    shuffled = np.random.default_rng(seed).permutation(len(work))
    order = balance(np.array(work, np.int64), shuffled, batch_rows, pending % batch_rows)
    assert sorted(order.tolist()) == list(range(len(work)))


def test_balance_groups_rows_of_equal_work():
    work = np.arange(1, 101) ** 3
    order = balance(work, np.random.default_rng(0).permutation(100), batch_rows=8, pending=5)
    head, tail = order[:3], order[3 + 96 :]
    assert ((work[[*head, *tail]] > 40**3) & (work[[*head, *tail]] < 60**3)).all()
    steps = work[order[3:99]].reshape(-1, 8)
    assert sorted(s.min() for s in steps) != [s.min() for s in steps]  # at random among themselves
    ranges = sorted((s.min(), s.max()) for s in steps)
    assert all(
        a[1] <= 1.11 * b[0] for a, b in itertools.pairwise(ranges)
    )  # but for a level of a tenth, they do not mix


def test_pack_searches_few_rows():
    """A row whose vision rows are half full has patches left, but for no such image; few rows are tried."""
    rng = np.random.default_rng(0)
    n = 2000
    patches = rng.integers(1950, 2600, n)
    lengths = Lengths((patches + 40).astype(np.int64), patches.astype(np.int64), np.arange(n + 1))
    calls = 0

    def counted(*args):
        nonlocal calls
        calls += 1
        return place(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "place", counted)
        _, offsets = pack(np.arange(n), lengths, RowShape(8192, 2, 3840))
    assert len(offsets) - 1 == n // 2 and calls < 3 * 2 * n
