"""Conversations in the forms of other trainers: flags, system messages, thoughts, options, roles, parts and boxes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from phivision_jax.data.quarantine import Quarantined
from phivision_jax.data.sources.source import Read
from tests.support.items import FORMS, item_of, messages_of, read
from tests.support.records import png

PNG = png(24, 16)


def test_flags_that_cannot_be_understood():
    for form, flag in itertools.product(FORMS[:2], ({"loss": True}, {"train": 1}, {"weight": 1})):
        item = {form: messages_of(form, 1)}
        item[form][0] |= flag
        bad = read(item)
        assert isinstance(bad, Quarantined) and "message 0 (user) is marked for the loss" in bad.detail
    both = {"messages": messages_of("messages", 1)}
    both["messages"][1] |= {"loss": False, "weight": 1}
    assert "weight and loss contradict each other" in read(both).detail  # type: ignore[union-attr]
    for key in ("mask", "loss_mask", "ignore", "skip_loss", "masked", "is_trainable", "supervised", "label_mask"):
        item = {"messages": messages_of("messages", 1)}
        item["messages"][1][key] = 1
        assert f"--rename {key}=weight" in read(item).detail  # type: ignore[union-attr]
    item["messages"][1] = {"role": "assistant", "content": "a", "learn": False}
    found = read({"messages": [*messages_of("messages", 1), *item["messages"]]}, rename=("learn=weight",))
    assert isinstance(found, Read) and found.record.messages[3] == {"role": "assistant", "content": "a", "weight": 0}
    marked = read({**item_of("messages"), "train": False})
    assert isinstance(marked, Quarantined) and marked.reason == "empty-answer"
    assert "must be 0 (no loss) or 1" in read({**item_of("messages"), "weight": 71.5}).detail  # type: ignore[union-attr]


def test_system_field():
    turns = [{"role": "system", "content": "Be brief."}, *messages_of("messages", 1)]
    same = read({"messages": turns, "system_prompt": "Be brief."})
    assert isinstance(same, Read) and list(same.record.messages) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "what?"},
        {"role": "assistant", "content": "that 0"},
    ]
    other = read({"messages": turns, "system": "Be kind."})
    assert isinstance(other, Quarantined) and "the field system is another system message" in other.detail
    for form in FORMS:
        moved = read({**item_of(form), "system": "Be brief."}, system="user")
        assert isinstance(moved, Read) and moved.record.messages[0]["content"] == "Be brief.\n\nwhat?"
        dropped = read({**item_of(form), "system": "Be brief."}, system="drop")
        assert isinstance(dropped, Read) and dropped.system and len(dropped.record.messages) == 2
    image = read({"question": "what?", "answer": "that", "image": PNG, "system": "Be brief."})
    assert isinstance(image, Read) and image.record.messages[1]["content"] == "<image>\nwhat?"


def test_thoughts():
    for form, key in itertools.product(FORMS, ("reasoning", "thinking", "thoughts")):
        found = read({**item_of(form), key: " Red. "})
        assert isinstance(found, Read) and found.record.mode == "think"
        assert found.record.messages[1]["content"] == "<think>Red.</think>that 0"
    two = read({"messages": messages_of("messages", 2), "reasoning": "Red."})
    assert isinstance(two, Quarantined) and "unclear of which of 2 answers" in two.detail
    message = {"role": "assistant", "content": "<think>Red.</think>yes", "reasoning": "Red.", "thinking": " "}
    item = {"messages": [messages_of("messages", 1)[0], message]}
    assert read(item).record.messages[1]["content"] == "<think>Red.</think>yes"  # type: ignore[union-attr]
    message["reasoning"] = "Blue."
    assert "two different texts as its thoughts" in read(item).detail  # type: ignore[union-attr]
    message |= {
        "reasoning": None,
        "content": [{"type": "thinking", "thinking": "Red."}, {"type": "text", "text": "yes"}],
    }
    assert read(item).record.messages[1]["content"] == "<think>Red.</think>yes"  # type: ignore[union-attr]
    for value in (False, True, 3):
        flag = read({**item_of("messages"), "thinking": value})
        assert isinstance(flag, Quarantined) and "they must be text" in flag.detail
    item["messages"][0]["reasoning"] = "Red."
    assert "only answers have them" in read(item).detail  # type: ignore[union-attr]


def test_options():
    def asked(question: str, answer: Any, options: Any, key: str = "options") -> Any:
        result = read({"question": question, "answer": answer, key: options})
        return result.record.messages[0]["content"] if isinstance(result, Read) else result.detail

    assert asked("Which?", "B", ["cat", "box"]) == "Which?\nA. cat\nB. box"
    assert asked("Which?", "box", ["cat", "box"], "choices") == "Which?\nA. cat\nB. box"
    assert asked("How many?", 4, [3, 4]) == "How many?\nA. 3\nB. 4"
    assert asked("Which?", "A", ["A. cat", "B. box"]) == "Which?\nA. cat\nB. box"
    assert asked("Which? (A) cat (B) box", "A", ["cat", "box"]) == "Which? (A) cat (B) box"
    assert "unclear whether the first of the options is 0 or 1" in asked("Which?", "1", ["cat", "box"])
    assert "must be a list of up to 26 texts" in asked("Which?", "A", "['cat', 'box']")
    assert "must be a list" in asked("Which?", "A", {"A": "cat"})
    assert "--rename answer_choices=options" in asked("Which?", "A", ["cat", "box"], "answer_choices")
    columns = read({"question": "Which?", "answer": "A", "A": "cat", "B": "box"})
    assert isinstance(columns, Quarantined) and "the field A looks like an option" in columns.detail
    for form in FORMS[:2]:
        for turns in (1, 2):
            item = {form: messages_of(form, turns), "options": ["what", "?"]}
            assert read(item).record.messages == read({form: item[form]}).record.messages  # type: ignore[union-attr]
        bad = read(item | {"options": ["cat"]})
        assert isinstance(bad, Quarantined) and "options that the messages do not" in bad.detail
        one = read({form: messages_of(form, 1), "options": ["cat"]})
        assert one.record.messages[0]["content"] == "what?\nA. cat"  # type: ignore[union-attr]


def test_roles():
    def roles(*names: str, **options: Any) -> Any:
        result = read({"messages": [{"role": name, "content": "x"} for name in names]}, **options)
        return [m["role"] for m in result.record.messages] if isinstance(result, Read) else result.detail

    expected = ["system", "user", "assistant", "user", "assistant"]
    assert roles("Developer", "HUMAN", "Gpt", "prompter", "model") == expected
    assert roles("Alice", "bob", rename=("Alice=user", "bob=assistant")) == ["user", "assistant"]
    assert "--rename Alice=user or Alice=assistant" in roles("Alice")
    assert roles("user", "assistant", rename=("user=dataset_user", "assistant=id")) == ["user", "assistant"]
    for name in ("tool", "function", "observation", "function_call"):
        assert "tools are not supported: leave the record out" in roles("user", name)


def test_keys_of_messages_and_parts_are_renamed():
    talk = [{"speaker": "user", "body": [{"type": "image", "img": PNG}, {"type": "text", "text": "what?"}]}]
    talk.append({"speaker": "assistant", "body": "that", "extra": 1})
    result = read({"messages": talk}, rename=("speaker=role", "body=content", "img=image", "text=question"))
    assert isinstance(result, Read) and result.record.images == (PNG,)
    assert result.unread == (("extra of messages", 1),)
    bad = read({"messages": talk}, rename=("speaker=role", "body=content"))
    assert isinstance(bad, Quarantined) and "--rename img=image" in bad.detail


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ({"type": "video", "video": "a.mp4"}, "unread"),
        ({"type": "input_audio", "input_audio": {"data": "x"}}, "unread"),
        ({"type": "tool_use", "name": "w"}, "fields"),
        ({"type": "image", "source": {"type": "base64", "data": "iVBORw0KGgo" + "A" * 50}}, "unread"),
        ({"type": "text", "text": "x", "image": "a.png"}, "unread"),
        ({"type": "image", "image": "a.png", "max_pixels": 3}, "unread"),
        ({"type": "image", "image": "a.png", "text": "a cat"}, "unread"),
        ({"type": "thinking", "thinking": "x", "image": "a.png"}, "unread"),
    ],
)
def test_parts_that_are_refused(part, reason):
    item = {"messages": [{"role": "user", "content": [part]}, messages_of("messages", 1)[1]]}
    bad = read(item)
    assert isinstance(bad, Quarantined) and bad.reason == reason, bad


def test_null_and_numbers():
    nan = float("nan")
    talk = [{"from": "human", "value": 2, "role": nan}, {"from": "gpt", "value": 4.5, "weight": nan}]
    result = read({"id": nan, "image": nan, "images": [nan], "conversations": talk, "task": nan})
    assert isinstance(result, Read) and result.record.id == "made:1" and result.record.images == ()
    assert [m["content"] for m in result.record.messages] == ["2", "4.5"]
    differing = read({"messages": [{"role": "user", "from": "human", "content": "a"}, messages_of("messages", 1)[1]]})
    assert isinstance(differing, Quarantined) and "has both from and role, and they differ" in differing.detail
    both = read({"messages": messages_of("messages", 1), "conversations": messages_of("conversations", 1)})
    assert isinstance(both, Quarantined) and "it has both conversations and messages" in both.detail


def test_struct_that_is_no_image_is_refused():
    for struct in ({"data": "x"}, {"file_name": "a.png", "width": 3}, {"bytes": None, "src": "a.png"}):
        for item in (item_of("question") | {"image": struct}, item_of("texts") | {"images": [struct]}):
            bad = read(item)
            assert isinstance(bad, Quarantined) and "it needs bytes, path or url" in bad.detail


def test_error_names_the_message_of_a_marker():
    bad = read({"conversations": [*messages_of("conversations", 1), {"from": "human", "value": "<image>?"}]})
    assert isinstance(bad, Quarantined) and bad.reason == "image-count"
    assert bad.detail == "1 <image> markers (message 2: 1), but 0 images; write <\\image> where the text is meant"


@pytest.mark.parametrize(
    ("objects", "text"),
    [
        ({"bbox": [[0.5, 0.25, 1, 1]], "bbox_type": "norm1"}, "[0.500, 0.250, 1.000, 1.000]"),
        ({"bbox": [[12, 4, 24, 16]], "bbox_type": "real"}, "[0.500, 0.250, 1.000, 1.000]"),
        ({"bbox": [[500, 250, 1000, 1000]], "bbox_type": "norm1000"}, "[0.500, 0.250, 1.000, 1.000]"),
        ({"bbox": [[12, 4, 24, 16]], "bbox_type": "norm100"}, "bbox_type is 'norm100'"),
        ({"bbox": [[12, 4, 12, 12]], "format": "xywh"}, "objects has the field format"),
    ],
)
def test_units_of_objects(objects, text):
    result = read({"question": "<bbox>", "answer": "that", "image": PNG, "objects": objects})
    assert text in (result.record.messages[0]["content"] if isinstance(result, Read) else result.detail)
