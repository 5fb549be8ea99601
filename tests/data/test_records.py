from __future__ import annotations

import pytest

from phivision_jax.data.records import Record, mode_of
from tests.support.records import make_record


def test_record_bytes_round_trip():
    record = make_record(
        0,
        ((24, 16), (8, 8)),
        mode="think",
        task="math",
        metadata={"url": "https://example.org/é", "boxes": [[0.25, 0.5]], "n": 3, "none": None},
        messages=(
            {"role": "user", "content": "<image><image>1+1"},
            {"role": "assistant", "content": "<think>e</think>2"},
        ),
    )
    assert Record.from_bytes(record.to_bytes()) == record


@pytest.mark.parametrize(
    "answers, mode",
    [
        (["4"], "nothink"),
        (["<think>hm</think>4"], "think"),
        (["4", "<think>hm</think>4"], "think"),
        (["<think> is a tag", "4"], "think"),
        (["write <think> and </think>"], "nothink"),
        ([" <think>hm</think>4"], "nothink"),
        (["<|dummy_84|><think>"], "nothink"),
    ],
)
def test_mode_of(answers, mode):
    turns = [({"role": "user", "content": "<think>?"}, {"role": "assistant", "content": a}) for a in answers]
    messages = tuple(message for turn in turns for message in turn)
    assert mode_of(make_record(0, (), mode=None, messages=messages)) == mode
    assert mode_of(make_record(0, (), mode="nothink", messages=messages)) == "nothink"


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"id": ""}, "empty id"),
        ({"messages": ()}, "'a' has no messages"),
        ({"mode": "fast"}, "'a': mode must be"),
        ({"task": " "}, "'a': the task ' ' must be a name of 1 to 64 printable characters"),
        ({"task": "a\nb"}, "must be a name"),
        ({"task": 65 * "a"}, "must be a name"),
    ],
)
def test_record_rejects_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        Record(**{"id": "a", "source": "s", "images": (), "messages": ({"role": "user", "content": "x"},)} | fields)
