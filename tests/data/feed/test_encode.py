from __future__ import annotations

import numpy as np
import pytest

from phivision_jax.data.feed.encode import GROUP_NAMES, encode_record, group_id, placeholder_example
from phivision_jax.data.quarantine import BadRecord
from phivision_jax.data.records import MODES, TASKS, mode_of
from phivision_jax.data.store.record_check import count_text_tokens
from phivision_jax.images.layout import ImageSize
from phivision_jax.text.constants import IGNORE
from tests.support.records import make_record


def test_group_id_is_mode_by_task():
    assert GROUP_NAMES[group_id("think", "general")] == "think/general"
    assert GROUP_NAMES[group_id("nothink", "chart")] == "nothink/chart"
    assert sorted(group_id(m, t) for m in MODES for t in TASKS) == list(range(len(GROUP_NAMES)))  # type: ignore[arg-type]


def test_mode_of_record_without_mode():
    def answered(text: str):
        return make_record(0, (), mode=None, messages=({"role": "assistant", "content": text},))

    assert mode_of(answered("<think>hm</think>4")) == "think"
    assert mode_of(answered("4")) == "nothink"
    asked = ({"role": "user", "content": "what is <think>?"}, {"role": "assistant", "content": "a tag"})
    assert mode_of(make_record(0, (), mode=None, messages=asked)) == "nothink"
    assert mode_of(make_record(0, mode="nothink")) == "nothink"


def test_encode_record(processor):
    record = make_record(0, ((24, 16),), task="chart")
    example = encode_record(record, processor)
    (image,) = example.images
    assert image.grids == ((2, 3),) and image.patches.shape == (6, 192)
    assert example.group == group_id("nothink", "chart")
    assert len(example.tokens) == count_text_tokens(record, processor) + 6
    learned = example.labels[example.labels != IGNORE]
    assert processor.decode(learned) == "yes"


def test_placeholder_example_has_planned_size(processor):
    sizes = [ImageSize(((2, 3),), 6), ImageSize(((1, 4),), 4)]
    example = placeholder_example(7, sizes, processor.layout)
    assert len(example.tokens) == 17 and example.num_patches == 10 and example.text_tokens == 7
    assert example.image_starts == (0, 6) and [image.size for image in example.images] == sizes
    assert (example.labels == IGNORE).all() and not any(np.any(image.patches) for image in example.images)
    assert placeholder_example(7, [], processor.layout).image_starts == ()


@pytest.mark.parametrize(
    "images, reason", [((b"not an image",), "image-broken"), ((), "fields"), ((b"",), "image-broken")]
)
def test_encode_record_reports_reason(processor, images, reason):
    with pytest.raises(BadRecord) as error:
        encode_record(make_record(0, images=images), processor)
    assert error.value.reason == reason


def test_encode_record_limits_patches(processor):
    record = make_record(0, ((64, 64),))
    (full,), (fewer,) = (encode_record(record, processor, most).images for most in (None, 20))
    assert full.grids == ((8, 8),) and fewer.grids == ((4, 4),)
