"""Keys of other trainers: each is imported with its meaning, refused with a remedy, or named; none is ignored.

The spellings are those of the documentation of these projects:

    LLaMA-Factory     data/README.md: columns and tags of the alpaca and sharegpt formats
    ms-swift          docs/source_en/Customization/Custom-dataset.md: standard keys, RLHF, grounding, multimodal
    TRL               docs/source/dataset_formats.md: types of datasets, tool calling, Harmony
    axolotl           docs/dataset-formats: train and train_detail of turns, tokenized data
    OpenAI            reference of FineTuneChatRequestInput and its messages
    mistral-finetune  README.md: weights of turns, tools
    LLaVA, Qwen-VL    data of LLaVA and of qwen-vl-finetune, and markers of Qwen-VL
    MMMU, ScienceQA   columns of the datasets on the Hugging Face hub
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from phivision_jax.data.quarantine import Quarantined
from phivision_jax.data.sources import keys
from phivision_jax.data.sources.source import Read
from phivision_jax.text.chat import ESCAPE
from tests.support.items import FORMS, item_of, messages_of, read
from tests.support.paths import ROOT
from tests.support.records import png

PNG = png(24, 16)
TOOLS = [{"type": "function", "function": {"name": "w", "arguments": "{}"}}]
TURN = [{"from": "gpt", "value": "no"}]

# Trainer, key, value, and the outcome: "refused", "named", or the meaning with which the value is imported.
RECORD = [
    ("LLaMA-Factory", "system", "Be brief.", "system"),
    ("LLaMA-Factory", "tools", TOOLS, "refused"),
    ("LLaMA-Factory", "tools", '[{"name": "w"}]', "refused"),
    ("LLaMA-Factory", "videos", ["a.mp4"], "refused"),
    ("LLaMA-Factory", "audios", ["a.wav"], "refused"),
    ("LLaMA-Factory", "chosen", TURN[0], "refused"),
    ("LLaMA-Factory", "rejected", TURN[0], "refused"),
    ("LLaMA-Factory", "kto_tag", False, "refused"),
    ("LLaMA-Factory", "history", [["a", "b"]], "refused"),
    ("ms-swift", "rejected_response", "no", "refused"),
    ("ms-swift", "rejected_images", ["a"], "refused"),
    ("ms-swift", "label", False, "refused"),
    ("ms-swift", "label", 0.8, "named"),
    ("ms-swift", "channel", "math", "named"),
    ("ms-swift", "solution", "4", "named"),
    ("ms-swift", "margin", 0.5, "named"),
    ("TRL", "chat_template_kwargs", {"enable_thinking": False}, "refused"),
    ("TRL", "completion", "yes", "named"),
    ("TRL", "completion_mask", [0, 1], "refused"),
    ("TRL", "labels", [True, False], "refused"),
    ("TRL", "documents", [{"title": "a"}], "refused"),
    ("axolotl", "input_ids", [1, 2], "refused"),
    ("OpenAI", "functions", TOOLS, "refused"),
    ("OpenAI", "parallel_tool_calls", True, "named"),
    ("OpenAI", "non_preferred_output", TURN, "refused"),
    ("LLaVA", "video", "a.mp4", "refused"),
    ("Qwen-VL", "max_pixels", 50176, "refused"),
    ("MMMU", "image_1", "0.png", "refused"),
    ("ScienceQA", "img_path", "0.png", "refused"),
]
ANSWER = [
    ("ms-swift", "loss", False, "unlearned"),
    ("ms-swift", "loss", True, "learned"),
    ("ms-swift", "loss_scale", 0.0, "unlearned"),
    ("ms-swift", "loss_scale", 0.5, "refused"),
    ("axolotl", "train", False, "unlearned"),
    ("axolotl", "training", False, "unlearned"),
    ("axolotl", "train_detail", [{"begin_offset": 0, "end_offset": 1, "train": False}], "refused"),
    ("mistral-finetune", "weight", 0, "unlearned"),
    ("OpenAI", "weight", 1, "learned"),
    ("OpenAI", "tool_calls", TOOLS, "refused"),
    ("OpenAI", "function_call", TOOLS[0], "refused"),
    ("OpenAI", "refusal", "I cannot.", "refused"),
    ("OpenAI", "audio", {"id": "a"}, "refused"),
    ("OpenAI", "name", "bob", "named"),
    ("TRL", "thinking", "Red.", "think"),
    ("TRL", "reasoning_content", "Red.", "think"),
    ("TRL", "reasoning", "Red.", "think"),
    ("TRL", "assistant_masks", [0, 1], "refused"),
    ("LLaVA", "image", "0.png", "refused"),
    ("ms-swift", "chain_of_thought", "Red.", "refused"),
]


def check(plain: Any, item: dict[str, Any], key: str, value: Any, outcome: str, answer: int) -> None:
    """Compare an item that has the key with one that has not."""
    before, result = read(plain), read(item)
    assert isinstance(before, Read) and not before.unread
    if outcome == "refused":
        assert isinstance(result, Quarantined) and result.reason in ("unread", "fields"), result
        assert key in result.detail and any(word in result.detail for word in (": ", "--rename")), result.detail
        return
    assert isinstance(result, Read), result
    messages, changed = result.record.messages, {**before.record.messages[answer]}
    expected = [*before.record.messages]
    if outcome == "named":
        assert [(name.partition(" ")[0], example) for name, example in result.unread] == [(key, value)]
    elif outcome == "system":
        expected.insert(0, {"role": "system", "content": value})
        assert result.system
    elif outcome == "think":
        expected[answer] = changed | {"content": f"<think>{value}</think>{changed['content']}"}
        assert (result.record.mode, result.mode_from) == ("think", "inferred")
    elif outcome == "unlearned":
        expected[answer] = changed | {"weight": 0}
    assert list(messages) == expected


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("trainer", "key", "value", "outcome"), RECORD)
def test_keys_of_records(trainer, key, value, outcome, form, first):
    if form == "question" and key == "completion":
        outcome = "named"
    plain = item_of(form)
    check(plain, {key: value, **plain} if first else {**plain, key: value}, key, value, outcome, 1)


@pytest.mark.parametrize("answer", [1, 3])
@pytest.mark.parametrize("form", FORMS[:2])
@pytest.mark.parametrize(("trainer", "key", "value", "outcome"), ANSWER)
def test_keys_of_answers(trainer, key, value, outcome, form, answer):
    plain, item = ({form: messages_of(form, 2)} for _ in range(2))
    item[form][answer][key] = value
    check(plain, item, key, value, outcome, answer)


def test_keys_table_is_large_enough():
    assert len({key for _, key, _, _ in RECORD + ANSWER}) >= 40
    assert 8 * len(RECORD) + 4 * len(ANSWER) >= 200 and len({trainer for trainer, *_ in RECORD + ANSWER}) >= 5


@pytest.mark.parametrize(
    "key",
    [
        "imgs",
        "img",
        "Image-Path",
        "imageUrl",
        "pictures",
        "photo_file",
        "screenshot",
        "image_base64",
        "jpg",
        "figure_2",
    ],
)
def test_images_under_other_names_are_refused(key):
    for form, value in itertools.product(FORMS, ("0001", ["a", "b"], PNG, {"bytes": PNG, "path": None})):
        bad = read({**item_of(form), key: value})
        assert isinstance(bad, Quarantined) and bad.reason == "unread", (form, value)
        assert f"the field {key} looks like an image: --rename {key}=image" in bad.detail
        kept = read({**item_of(form), key: value}, rename=(f"{key}=dataset_{key}",))
        assert isinstance(kept, Read) and kept.unread == ()


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("x/0001.JPG", "image"),
        ("https://example.org/a.webp?width=3", "image"),
        ("data:image/png;base64,AAAA", "image"),
        ("iVBORw0KGgo" + "A" * 50, "image"),
        (PNG, "image"),
        ([["a.png"]], "image"),
        ({"file": {"path": "a.tiff"}}, "image"),
        ("clip.mp4", "video"),
        ("a.flac", "audio"),
        ("see a.png\nand b.png", None),
        ("a sentence.", None),
        (b"\x00\x01", None),
        (3.5, None),
    ],
)
def test_media_is_found_by_value(value, kind):
    assert keys.looks_like_media(value) == kind
    for name in ("anything", "category"):  # harmless names too
        result = read({**item_of("messages"), name: value})
        assert isinstance(result, Quarantined) == (kind is not None)
        if isinstance(result, Quarantined):
            assert result.reason == "unread" and f"the field {name} looks like " in result.detail


def test_names_of_images_that_are_read_are_no_images():
    item = {"question": "what?", "answer": "that", "image": PNG, "file_name": "a.png", "coco_url": "http://x/a.jpg"}
    result = read(item)
    assert isinstance(result, Read) and dict(result.unread) == {"file_name": "a.png", "coco_url": "http://x/a.jpg"}
    assert isinstance(read(item | {"image_2": "b.png"}), Quarantined)
    assert isinstance(read(item | {"image": None}), Quarantined)


@pytest.mark.parametrize(
    "marker",
    [
        *("<image 1>", "<Image>", "<img>", "<IMG>", "<video>", "<audio>", "<image_placeholder>", "<image/>", "<box>"),
        *("<start_of_image>", "<|image_1|>", "<|vision_start|>", "<|box_start|>", "<|object_ref_start|>"),
        *("<image-1>", "<IMG_CONTEXT>", "<im_patch>", "<quad>", "data:image/png;base64,", '"bbox_2d":'),
    ],
)
def test_markers_of_other_models_are_refused(marker):
    for question, answer in ((f"what is {marker}?", "that"), ("what?", f"it is {marker}")):
        bad = read({"question": question, "answer": answer})
        assert isinstance(bad, Quarantined) and bad.reason == "unread" and marker in bad.detail
        assert f"message {int(marker in answer)} " in bad.detail
        assert ("leave the record out" in bad.detail) == (marker in ("<video>", "<audio>"))
        has_escape = marker.lower().startswith(("<image", "<img", "<video", "<audio", "<box"))
        assert ("where the text is meant" in bad.detail) == has_escape
        if has_escape:
            escaped = marker.replace("<", "<\\")
            found = read({"question": question.replace(marker, escaped), "answer": answer.replace(marker, escaped)})
            assert isinstance(found, Read) and f"<\\{marker[1:]}" in bad.detail
            assert ESCAPE.match(f"<\\{marker[1:]}")  # encoding removes the backslash


def test_switch_has_no_escape():
    bad = read({"question": "what? /think", "answer": "that"})
    assert isinstance(bad, Quarantined) and "write the mode into the field mode" in bad.detail
    assert "where the text is meant" not in bad.detail


def test_html_is_no_marker():
    for text in ("<img src='a'>", "<video controls>", "<imagine>", "a < image > b", "<box-shadow>", "<audiobook>"):
        assert isinstance(read({"question": text, "answer": "that"}), Read)


def test_documentation_lists_every_key_that_is_understood():
    text = (ROOT / "docs" / "data.md").read_text()
    table = text[text.index("| key | in | meaning |") : text.index("Roles are compared")]
    for level, names in keys.UNDERSTOOD.items():
        assert [name for name in sorted(names) if f"`{name}`" not in table] == [], level


def test_blank_values_have_no_meaning():
    for key, blank in itertools.product(
        ("tools", "rejected", "imgs", "video"), (None, float("nan"), "", [], {}, [None])
    ):
        result = read({**item_of("messages"), key: blank})
        assert isinstance(result, Read) and result.unread == ()


def test_harmless_keys_are_neither_refused_nor_named():
    harmless = {"image_width": 3, "num_images": 2, "has_image": True, "split": "train",
                "question_type": "why", "answer_type": "x", "dataset_video": "a.mp4", "is_video": False}  # fmt: skip
    result = read({**item_of("messages"), **harmless})
    assert isinstance(result, Read) and result.unread == () and result.record.metadata == harmless
    result = read({**item_of("messages"), "image_id": "000123", "ocr_tokens": ["a"]})
    assert isinstance(result, Read) and dict(result.unread) == {"image_id": "000123", "ocr_tokens": ["a"]}
