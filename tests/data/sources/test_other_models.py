"""Forms in which other models mark thoughts, boxes and answers without loss: read, refused or named, never ignored."""

from __future__ import annotations

from typing import Any

import pytest

from phivision_jax.data.quarantine import Quarantined
from phivision_jax.data.sources.source import Read
from tests.support.items import read
from tests.support.records import png

THINK = "<think>Red.</think>four"
HARMONY = "<|channel|>analysis<|message|>Red.<|end|><|start|>assistant<|channel|>final<|message|>four"


def ask(answer: Any, question: str = "what?", **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **fields}


def refused(item: dict[str, Any], *words: str, **options: Any) -> None:
    result = read(item, **options)
    assert isinstance(result, Quarantined), result
    assert all(word in result.detail for word in words), result.detail


@pytest.mark.parametrize(
    "answer",
    [
        "<|begin_of_thought|>Red.<|end_of_thought|>\n<|begin_of_solution|>\nfour\n<|end_of_solution|>",
        "<|START_THINKING|>Red.<|END_THINKING|><|START_RESPONSE|>four<|END_RESPONSE|>",
        HARMONY,
        f"<|start|>assistant{HARMONY}<|return|>",
        "<|think|>Red.<|/think|>four",
    ],
)
def test_thoughts_and_answers_in_tags_of_other_models_are_read(answer):
    result = read(ask(answer))
    assert isinstance(result, Read) and result.record.mode == "think"
    assert result.record.messages[1]["content"] == THINK


def test_answers_in_tags_of_other_models_without_thoughts_are_read():
    result = read(ask("<|channel|>final<|message|>four<|return|>"))
    assert isinstance(result, Read) and (result.record.mode, result.mode_from) == ("nothink", "default")
    assert result.record.messages[1]["content"] == "four"


@pytest.mark.parametrize(
    "answer",
    [
        "<reflection>Red.</reflection>four",
        "<rationale>Red.</rationale>four",
        "<inner_thoughts>Red.</inner_thoughts>four",
        "<longcat_think>Red.</longcat_think>four",
        "<think step='1'>Red.</think>four",
        "< think >Red.</ think >four",
        "<|thinking|>Red.<|/thinking|>four",
        '<details type="reasoning">Red.</details>four',
        "<unused94>thought\nRed.<unused95>four",
        "<SUMMARY>s</SUMMARY><REASONING>Red.</REASONING><CONCLUSION>four</CONCLUSION>",
        "Red.</thinking>four",
        "Red.[/THINK]four",
        "Red.</seed:think>four",
        "Red.<|end_of_thought|>four",
    ],
)
def test_thoughts_in_unknown_tags_are_refused(answer):
    refused(ask(answer), "message 1", "write <think>thoughts</think>")


@pytest.mark.parametrize("text", ["I think <b>so</b>", "[I think so]", "<p>a reason</p>", "a < b, think of c > d"])
def test_other_texts_about_thinking_are_answers(text):
    result = read(ask(text))
    assert isinstance(result, Read) and result.record.messages[1]["content"] == text and not result.unread


@pytest.mark.parametrize("question", ["what? /no_think", "/think what?", "what?\n/nothink"])
def test_switches_of_the_mode_in_texts_are_refused(question):
    refused(ask("four", question), "message 0 contains /", "write the mode into the field mode")
    assert isinstance(read(ask("four", "what is a/think?")), Read)


@pytest.mark.parametrize(
    "part",
    [{"thought": True}, {"is_thought": True}, {"channel": "analysis"}],
)
def test_parts_marked_as_thoughts_are_refused(part):
    refused(ask([{"type": "text", "text": "Red."} | part, {"type": "text", "text": "four"}]), "message 1")


@pytest.mark.parametrize("key", ["is_context", "is_prompt", "is_valid", "has_errors", "exclude", "hidden", "frozen"])
def test_unknown_flags_are_named(key):
    item = ask("four")
    item["messages"][1][key] = False
    for given, name in ((item, f"{key} of messages"), (ask("four", **{key: False}), key)):
        result = read(given)
        assert isinstance(result, Read) and result.unread == ((name, False),)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bbox_2d", [1, 2, 3, 4]),
        ("point_2d", [1, 2]),
        ("boxes_xyxy", [[1, 2, 3, 4]]),
        ("bbox_normalized", True),
        ("normalized", False),
        ("is_normalised", True),
        ("rois", [[1, 2, 3, 4]]),
        ("xywh", [1, 2, 3, 4]),
        ("coord_scale", "1000"),
    ],
)
def test_coordinates_under_other_names_are_refused(key, value):
    refused(ask("four", **{key: value}), f"the field {key} looks like coordinates")


@pytest.mark.parametrize(
    "answer",
    [
        "<point x='3' y='4'>cup</point>",
        '<points x1="10.5" y1="4" alt="cups">cups</points>',
        '[{"bbox_2d": [1, 2, 3, 4], "label": "cup"}]',
        '{"point_2d" : [1, 2]}',
        "<bbox>1,2,3,4</bbox>",
        "<|det|>[[1, 2, 3, 4]]<|/det|>",
        "<click>3,4</click>",
        "<pos_1><pos_2>",
        "<seg_001>",
    ],
)
def test_boxes_in_forms_of_other_models_are_refused(answer):
    refused(ask(answer), "a marker of other models: write [x1, y1, x2, y2] and use --inline-boxes")


def test_placeholders_without_objects_are_named():
    result = read(ask("it is at <bbox>", "<image>where?", image=png(64, 30)))
    assert isinstance(result, Read) and result.unread == (("boxes in texts", "<bbox>"),)


@pytest.mark.parametrize("unit", ["pixels", "thousand"])
@pytest.mark.parametrize("box", [[0.1, 0.2, 0.3, 0.4], [0, 0, 1, 1], [0.0, 0.25, 1.0, 0.5]])
def test_shares_given_in_another_unit_are_refused(unit, box):
    objects = {"ref": ["cup"], "bbox": [box]}
    item = ask("<ref> at <bbox>", "<image>where?", image=png(640, 300), objects=objects)
    refused(item, f"is in shares of the sides, not in {unit}", boxes=unit)
    assert isinstance(read(item, boxes="unit"), Read)


def test_boxes_of_an_image_that_has_been_resized_are_refused():
    objects = {"ref": ["cup"], "bbox": [[64, 30, 128, 90]]}
    item = ask("<ref> at <bbox>", "<image>where?", image=png(640, 300), objects=objects)
    refused(item | {"width": 1280, "height": 600}, "width and height are (1280, 600), but the image has (640, 300)")
    for fields in ({}, {"width": 640, "height": 300}, {"width": 640}):
        assert isinstance(read(item | fields), Read)


def test_boxes_in_texts_are_named_or_rewritten():
    item = ask("at [64, 30, 128, 90]", "<image>where?", image=png(640, 300))
    result = read(item)
    assert isinstance(result, Read) and result.unread == (("boxes in texts", "[64, 30, 128, 90]"),)
    result = read(item, inline_boxes="pixels")
    assert isinstance(result, Read) and not result.unread
    assert result.record.messages[1]["content"] == "at [0.100, 0.100, 0.200, 0.300]"
    shares = read(ask("at [0.1, 0.2, 0.3, 0.4]", "<image>where?", image=png(640, 300)))
    assert isinstance(shares, Read) and not shares.unread


HUGE = "x" * 200_000
LONG: list[dict[str, Any]] = [
    ask("four", id=HUGE, tools=HUGE),
    ask("four", id=[HUGE]),
    ask("four", mode=HUGE),
    ask("four", task=HUGE),
    ask("four", image=HUGE),
    ask("four", image="http://" + HUGE),
    ask("four", image="gs://" + HUGE),
    ask("four", image="data:" + HUGE),
    ask("four", image={HUGE: 1}),
    ask("four", **{f"image_{HUGE}": "a.png"}),
    ask("four", **{HUGE: "a.png"}),
    ask("four", loss=HUGE),
    ask("four", loss=[HUGE]),
    ask("four", objects={HUGE: 1}),
    ask("four", objects={"bbox_type": HUGE}),
    ask("four", objects={"bbox_type": [HUGE]}),
    ask([{"type": HUGE, "text": "a"}]),
    ask([{"type": HUGE, "image": "a"}]),
    ask([{"type": "thinking", "text": [HUGE, 1]}]),
    ask(f"<img{HUGE}>"),
    ask("four", f"<points {HUGE} x1=3>"),
    ask(f"<rationale {HUGE}>"),
    ask(HUGE + "<image>"),
    {"messages": [{"role": HUGE, "content": "a"}]},
    {"messages": [{HUGE: "a"}] * 2},
    {"messages": HUGE},
    {HUGE: [{"messages": []}]},
    {f"{HUGE}{k}": 1 for k in range(50)},
    {"question": "q", "answer": "1" * 200_000, "options": ["a", "b"]},
    {"question": "q", "answer": "a", "options": HUGE},
]


@pytest.mark.parametrize("item", LONG, ids=range(len(LONG)))
def test_values_in_reasons_are_short(item):
    result = read(item)
    if isinstance(result, Read):
        assert isinstance(item["messages"][0].get("content"), str)  # nothing is wrong with a long text
    else:
        assert len(result.detail) < 450 and len(result.to_line()) < 900, result.detail
