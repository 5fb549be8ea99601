from __future__ import annotations

import numpy as np
import pytest

from phivision_jax.data.feed.encode import GROUP_NAMES, encode_record, group_id, hole
from phivision_jax.data.quarantine import BadRecord
from phivision_jax.data.records import MODES, TASKS, mode_of
from phivision_jax.data.store.record_check import count_text_tokens
from phivision_jax.text.constants import IGNORE
from tests.support.records import make_record


def test_groups_are_mode_by_task():
    assert GROUP_NAMES[group_id("think", "general")] == "think/general"
    assert GROUP_NAMES[group_id("nothink", "chart")] == "nothink/chart"
    assert sorted(group_id(m, t) for m in MODES for t in TASKS) == list(range(len(GROUP_NAMES)))  # type: ignore[arg-type]


def test_mode_of_a_record_that_states_none():
    def answered(text: str):
        return make_record(0, (), mode=None, messages=({"role": "assistant", "content": text},))

    assert mode_of(answered("<think>hm</think>4")) == "think"
    assert mode_of(answered("4")) == "nothink"
    asked = ({"role": "user", "content": "what is <think>?"}, {"role": "assistant", "content": "a tag"})
    assert mode_of(make_record(0, (), mode=None, messages=asked)) == "nothink"
    assert mode_of(make_record(0, mode="nothink")) == "nothink"


def test_an_encoded_record(processor):
    record = make_record(0, ((24, 16),), task="chart")
    example = encode_record(record, processor)
    (image,) = example.images
    assert image.grid == (2, 3) and image.patches.shape == (6, 192)
    assert example.group == group_id("nothink", "chart")
    assert len(example.tokens) == count_text_tokens(record, processor) + 6
    learned = example.labels[example.labels != IGNORE]
    assert processor.decode(learned) == "yes"


def test_a_hole_keeps_the_planned_size():
    example = hole(7, [(2, 3), (1, 4)], patch_dim=192)
    assert len(example.tokens) == 17 and example.num_patches == 10
    assert example.image_starts == (0, 6) and [i.grid for i in example.images] == [(2, 3), (1, 4)]
    assert (example.labels == IGNORE).all() and not any(np.any(i.patches) for i in example.images)
    assert hole(7, [], patch_dim=192).image_starts == ()


@pytest.mark.parametrize(
    "images, reason", [((b"not an image",), "image-broken"), ((), "fields"), ((b"",), "image-broken")]
)
def test_a_bad_record_says_why(processor, images, reason):
    with pytest.raises(BadRecord) as error:
        encode_record(make_record(0, images=images), processor)
    assert error.value.reason == reason


def test_fewer_patches_where_a_plan_allows_no_more(processor):
    record = make_record(0, ((64, 64),))
    (whole,), (fewer,) = (encode_record(record, processor, most).images for most in (None, 20))
    assert whole.grid == (8, 8) and fewer.grid == (4, 4)
