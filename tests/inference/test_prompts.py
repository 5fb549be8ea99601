"""Prompts: where they may be cut, what they share, what each position sees."""

import dataclasses
import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from phivision_jax.images.layout import PatchedImage
from phivision_jax.inference.prompts import Prompt
from phivision_jax.rows import expand, one_per_row
from tests.support.batches import TINY

TOKENS = 6
"""Vision tokens of each image."""


def image(number: int, grid=(2, 3)) -> PatchedImage:
    patches = np.random.default_rng(number).integers(0, 256, (TOKENS, TINY.vision.patch_dim), np.uint8)
    return PatchedImage(patches, (grid,))


def example_of(parts):
    """Positive parts are text tokens, −n is image n."""
    return expand([part if part > 0 else -200 for part in parts], [image(-p) for p in parts if p < 0])


def prompt_of(parts, mode) -> Prompt:
    return Prompt.from_example(example_of(parts), config_of(mode))


def config_of(mode):
    return dataclasses.replace(TINY, image_attention=mode)


def labels(parts) -> list:
    """One label per position: equal labels are equal tokens."""
    return [label for part in parts for label in ([part] if part > 0 else [(part, j) for j in range(TOKENS)])]


parts = st.lists(st.sampled_from([1, 2, -1, -2, 3]), min_size=1, max_size=8)
modes = st.sampled_from(["causal", "bidirectional"])


@given(parts, modes)
def test_a_prompt_is_cut_anywhere_but_in_an_image_that_sees_itself(given_parts, mode):
    prompt, known = prompt_of(given_parts, mode), labels(given_parts)
    starts = [i for i, label in enumerate(known) if not (isinstance(label, tuple) and label[1] > 0)]
    for end in range(len(prompt) + 1):
        allowed = range(end + 1) if mode == "causal" else [i for i in [*starts, len(known)] if i <= end]
        assert prompt.cut_before(end) == max(allowed)


@given(parts, parts, modes)
def test_shared_prefix(first, second, mode):
    """The longest common beginning that may be cut off, with the last token and without."""
    prompt, other = prompt_of(first, mode), prompt_of(second, mode)
    a, b = labels(first), labels(second)
    common = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    assert prompt.alike(other.identity) == prompt.cut_before(common)
    assert prompt.key(common) == other.key(common) and len(prompt.key()) == 8 * len(prompt)
    assert prompt.shared(other.identity) == prompt.cut_before(min(common, len(a) - 1))
    assert prompt.shared(np.zeros(0, np.int64)) == 0


@given(parts, modes, st.data())
def test_span_ends_of_pieces_are_those_of_rows(given_parts, mode, data):
    """For pieces that end where a prompt may be cut, as in the rows that models are trained on."""
    prompt = prompt_of(given_parts, mode)
    want = one_per_row([example_of(given_parts)], config_of(mode)).span_end[0]
    cuts = {prompt.cut_before(data.draw(st.integers(0, len(prompt)))) for _ in range(3)} | {0, len(prompt)}
    ordered = sorted(cuts)
    found = [prompt.span_end(start, end) for start, end in itertools.pairwise(ordered)]
    np.testing.assert_array_equal(np.concatenate(found), want)


def test_equal_images_have_equal_keys_and_others_do_not():
    first = image(1)
    assert first.key == image(1).key
    changed = dataclasses.replace(first, patches=first.patches.copy())
    changed.patches[3, 5] ^= 1
    table = np.zeros((TOKENS, 1, 1), np.int32)
    merged = dataclasses.replace(first, merge_index=table, merge_weight=table.astype(np.float32))
    other = dataclasses.replace(merged, merge_weight=merged.merge_weight + 1)
    images = [first, changed, image(1, grid=(3, 2)), image(1, grid=(1, 6)), merged, other]
    assert len({each.key for each in images}) == len(images)


def test_image_tokens_are_counted():
    prompt = prompt_of([1, -1, 2, -2, 3], "causal")
    assert (len(prompt), prompt.image_tokens) == (3 + 2 * TOKENS, 2 * TOKENS)
    assert [(each.start, each.end) for each in prompt.images] == [(1, 7), (8, 14)]
    assert (prompt.identity[1:7] < 0).all() and len(set(prompt.identity.tolist())) == len(prompt)
