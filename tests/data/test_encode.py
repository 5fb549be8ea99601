from __future__ import annotations

import numpy as np
import pytest
from made_up import make_record

from phivision_jax.batch import IGNORE
from phivision_jax.data.encode import GROUP_NAMES, encode_record, group_id, hole
from phivision_jax.data.records import MODES, TASKS, count_text_tokens, mode_of


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


@pytest.mark.parametrize("images", [(b"not an image",), (), (b"",)])
def test_a_bad_record_is_a_value_error(processor, images):
    with pytest.raises(ValueError):
        encode_record(make_record(0, images=images), processor)
