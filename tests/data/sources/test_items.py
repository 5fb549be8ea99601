from __future__ import annotations

import base64
import contextlib
import dataclasses
import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from phivision_jax.data.quarantine import BadRecord, Quarantined
from phivision_jax.data.records import Record
from phivision_jax.data.sources.item_options import ItemOptions
from phivision_jax.data.sources.items import ItemReader
from phivision_jax.data.sources.source import Read
from phivision_jax.data.store.record_check import check_record
from phivision_jax.text.chat import flatten
from tests.support.records import png

PNG = [png(24, 16, seed) for seed in range(4)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    for k, image in enumerate(PNG):
        (tmp_path / f"{k}.png").write_bytes(image)
        (tmp_path / "in" / f"{k}.png").write_bytes(image)
    return tmp_path


def read(item: Any, folder: Path = Path(), **options: Any) -> Read | Quarantined:
    reader = pickle.loads(pickle.dumps(ItemReader("made", folder, ItemOptions(**options))))
    return reader.read(item, "made.json:7", "made.json, item 7")


def record(item: Any, folder: Path = Path(), **options: Any) -> Record:
    result = read(item, folder, **options)
    assert isinstance(result, Read), result
    return result.record


def refused(item: Any, folder: Path = Path(), **options: Any) -> Quarantined:
    result = read(item, folder, **options)
    assert isinstance(result, Quarantined), result
    return result


def talk(question: str = "what?", answer: str = "that") -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def turns_of(*contents: str) -> tuple[dict[str, str], ...]:
    roles = ["user", "assistant"] * len(contents)
    return tuple({"role": role, "content": content} for role, content in zip(roles, contents, strict=False))


def test_reader_llava(folder):
    item = {"id": 17, "image": "in/1.png", "conversations": talk("<image>\nwhat?"), "mode": "think", "task": "chart",
            "source": "charts", "difficulty": 3, "metadata": {"by": "me"}}  # fmt: skip
    assert record(item, folder) == Record(
        "17", "charts", (PNG[1],), turns_of("<image>\nwhat?", "that"), "think", "chart", {"by": "me", "difficulty": 3}
    )
    assert record({"conversations": talk()}) == Record("made.json:7", "made", (), turns_of("what?", "that"), "nothink")
    assert record({"image": "in/1.png", "conversations": talk("<image>")}, folder / "x", images=folder).images


def test_reader_openai_parts(folder):
    uri = "data:image/png;base64," + base64.b64encode(PNG[3]).decode()
    content = [
        {"type": "text", "text": "left:"},
        {"type": "image_url", "image_url": {"url": uri}},
        {"type": "image"},
        {"type": "text", "text": "a literal <image> too"},
        {"type": "image", "image": {"bytes": PNG[0], "path": None}},
        {"type": "image_url", "image_url": "in/2.png"},
    ]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}]
    found = record({"messages": messages, "images": ["0.png", {"bytes": PNG[1]}]}, folder)
    assert found.images == (PNG[3], PNG[0], PNG[1], PNG[0], PNG[2])
    parts = [{"type": "image"} if p["type"] == "image_url" else p for p in content]
    plain, _ = flatten([{"role": "user", "content": parts}])
    assert found.messages[0]["content"] == plain[0]["content"]


def test_reader_ignores_nulls_of_structs(folder):
    parts = [
        {"type": "image", "text": None, "image": None, "index": 0},
        {"type": "text", "text": "what?", "image": None, "index": None},
    ]
    turn = {"role": "user", "content": parts, "from": None}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "that", "image": None, "index": None}]}
    item = {
        "messages": [turn, answer],
        "images": ["0.png"],
        "conversations": None,
        "image": {"bytes": None, "path": None},
    }
    assert record(item, folder).messages == turns_of("<image>\nwhat?", "that")
    parts[0]["index"] = 1
    assert refused(item, folder).reason == "fields"


@pytest.mark.parametrize("empty", [None, "", [], [None], {"bytes": None, "path": None}])
def test_reader_empty_image_is_none(empty):
    assert record({"image": empty, "conversations": talk()}).images == ()


def test_reader_zero_bytes_are_an_image():
    assert record({"image": b"", "conversations": talk("<image>")}).images == (b"",)


def test_reader_prepends_markers(folder):
    texts = [{"user": "what?", "assistant": "that", "source": "x"}, {"user": "and?", "assistant": "this"}]
    found = record({"images": ["0.png", "1.png"], "texts": texts}, folder)
    assert found.messages == turns_of("<image>\n<image>\nwhat?", "that", "and?", "this") and found.images == (
        PNG[0],
        PNG[1],
    )
    found = record({"image": "0.png", "question": "what?", "answers": ["that", "this"]}, folder)
    assert found.messages == turns_of("<image>\nwhat?", "that") and found.metadata == {}
    found = record({"image": "0.png", "question": "what is <image>?", "answer": "that", "answers": ["x"]}, folder)
    assert found.messages == turns_of("what is <image>?", "that") and found.metadata == {"answers": ["x"]}


def test_reader_dict_of_lists():
    found = record({"conversations": {"from": ["human", "gpt"], "value": ["what?", "that"]}})
    assert found.messages == turns_of("what?", "that")
    assert refused({"conversations": {"from": ["human"], "value": ["what?", "that"]}}).reason == "fields"


def test_reader_ids():
    assert record({"uid": 3.5, "question_id": 2, "conversations": talk()}).metadata == {"question_id": 2}
    assert record({"id": "", "uid": None, "question_id": 0, "conversations": talk()}).id == "0"
    bad = refused({"id": 5})
    assert bad == Quarantined("5", "made", "fields", bad.detail, "made.json, item 7") and "conversation" in bad.detail
    assert refused({"id": [5], "conversations": talk()}).id == "made.json:7"


def test_reader_renames_fields():
    item = {"prompt": "what?", "caption": "that", "number": 4, "id": "theirs", "question": "lost"}
    options = {"rename": ("prompt=question", "caption=answer", "number=id", "absent=task")}
    found = record(item, **options)
    assert found.id == "4" and found.messages == turns_of("what?", "that") and found.metadata == {}
    assert refused(item | {"caption": True}, **options).id == "4"
    both = refused({"a": "x.png", "b": "y.png", "conversations": talk("<image>")}, rename=("a=image", "b=image"))
    assert both.reason == "fields" and both.detail == "a and b are both renamed to image, and both have a value"
    assert record({"a": None, "question": "q", "answer": 1}, rename=("a=question",)).messages == turns_of("q", "1")


@pytest.mark.parametrize(
    "answers, stated, default, mode, mode_from",
    [
        (["a", "b"], None, "nothink", "nothink", "default"),
        (["a", "b"], None, "think", "think", "default"),
        (["a", "<think>x</think>b"], None, "nothink", "think", "inferred"),
        (["\n <think>x</think>b"], None, "refuse", "think", "inferred"),
        (["<|dummy_84|>a"], None, "think", "nothink", "inferred"),
        (["<|dummy_84|>a", "<think>x</think>b"], None, "nothink", "think", "inferred"),
        (["<think>x</think>b", "<|dummy_84|>a"], None, "nothink", "think", "inferred"),
        (["<|dummy_84|>a", "<think>x</think>b"], "think", "nothink", "think", "stated"),
        (["<think>x</think>b"], "nothink", "nothink", "nothink", "stated"),
        (["\n <think>x</think>b"], "think", "nothink", "think", "stated"),
        (["\n <think>x</think>b"], "nothink", "nothink", "nothink", "stated"),
        ([" <|dummy_84|>a"], "nothink", "nothink", "nothink", "stated"),
    ],
)
def test_settle_mode(answers, stated, default, mode, mode_from):
    turns = [turn for answer in answers for turn in talk("what is <think>?", answer)]
    result = read({"conversations": turns, "mode": stated}, default_mode=default)
    assert isinstance(result, Read) and (result.record.mode, result.mode_from) == (mode, mode_from)
    given = [m["content"] for m in result.record.messages if m["role"] == "assistant"]
    assert given == [answer.lstrip().removeprefix("<|dummy_84|>") for answer in answers]


@pytest.mark.parametrize(
    "answer, stated, kept, mode",
    [
        ("\nred\n</think>yes", None, "<think>\nred\n</think>yes", "think"),
        ("</think>yes", "think", "yes", "think"),  # blank thoughts are none: quarantined by the check of records
        ("<think>\n\n</think>\n\nfour", None, "four", "nothink"),
        (" <Thinking>red</thinking>yes", None, "<think>red</think>yes", "think"),
        ("[THINK]red[/THINK]yes", None, "<think>red</think>yes", "think"),
        ("<|begin_of_thought|>red<|end_of_thought|>yes", None, "<think>red</think>yes", "think"),
        ("<reasoning> </reasoning>yes", None, "yes", "nothink"),
        ("red</think>yes", "nothink", "red</think>yes", "nothink"),  # quarantined by the check of records
        ("<|dummy_84|>red</think>yes", None, "red</think>yes", "nothink"),
        ("red</think>or</think>yes", None, "red</think>or</think>yes", "nothink"),
        ("write <think> and </think>", None, "write <think> and </think>", "nothink"),
    ],
)
def test_settle_mode_restores_think_tag(answer, stated, kept, mode):
    result = read({"conversations": talk("what is </think>?", answer), "mode": stated})
    assert isinstance(result, Read) and result.record.messages == turns_of("what is </think>?", kept)
    assert result.record.mode == mode
    if kept != answer:
        assert result.mode_from == ("stated" if stated else "inferred")


@pytest.mark.parametrize(
    "form", [("conversations", "from", "value", "gpt"), ("messages", "role", "content", "assistant")]
)
def test_reader_weights(form):
    field, role, content, assistant = form

    def weighted(weight: Any, speaker: str = assistant) -> dict[str, Any]:
        return {field: [*talk(), {role: speaker, content: "x", "weight": weight}]}

    for weight in (0, 0.0):
        assert record(weighted(weight)).messages[2] == {"role": "assistant", "content": "x", "weight": 0}
        assert record(weighted(weight, "user")).messages[2] == {"role": "user", "content": "x"}
    for weight in (1, None):
        assert record(weighted(weight)).messages[2] == {"role": "assistant", "content": "x"}
    for weight in (0.5, -1, "0", [0]):
        assert refused(weighted(weight)).reason == "fields" and "weight" in refused(weighted(weight)).detail


def test_reader_also_allow(folder):
    (folder / "pictures").mkdir()
    (folder / "pictures" / "1.png").symlink_to(folder / "in" / "1.png")
    item = {"image": "1.png", "conversations": talk("<image>")}
    bad = refused(item, folder / "pictures")
    assert bad.reason == "image-path" and "--also-allow" in bad.detail
    assert record(item, folder / "pictures", also_allow=(folder / "x", folder / "in")).images == (PNG[1],)


def test_reader_suggests_rename():
    for field, value, hint in (
        ("task", "a\tb", "printable characters"),
        ("mode", "cot", "think, nothink"),
        ("source", [1], "list"),
    ):
        item = {"conversations": talk(), field: value}
        bad = refused(item)
        assert bad.reason == "fields" and hint in bad.detail
        assert f"--rename {field}=dataset_{field} keeps it as metadata" in bad.detail
        found = record(item, rename=(f"{field}=dataset_{field}",), task="ocr")
        assert found.metadata == {f"dataset_{field}": value} and found.task == "ocr"


def test_reader_describes_item_without_conversation():
    bad = refused({"id": 1, "prompt": "a", "caption": "b", "nothing": None})
    assert bad.detail.endswith(", only id, prompt, caption (--rename theirs=ours)")


def test_reader_system_messages():
    turns = [{"from": "system", "value": "be kind"}, *talk(), {"from": "system", "value": "be brief"}, *talk()]
    assert [m["role"] for m in record({"conversations": turns}).messages][::3] == ["system", "system"]
    moved = record({"conversations": turns}, system="user").messages
    assert moved == turns_of("be kind\n\nbe brief\n\nwhat?", "that", "what?", "that")
    assert record({"conversations": turns}, system="drop").messages == turns_of("what?", "that", "what?", "that")
    for policy in ("template", "user", "drop"):
        result = read({"conversations": turns}, system=policy)
        assert isinstance(result, Read) and result.system and result.where == "made.json, item 7"
    assert not read({"conversations": talk()}).system  # type: ignore[union-attr]
    pictured = [{"from": "system", "value": "<image>"}, *talk()]
    assert refused({"conversations": pictured, "image": PNG[0]}, system="drop").reason == "image-count"
    assert refused({"conversations": [turns[0], talk()[1]]}, system="user").reason == "role"
    assert "besides system messages" in refused({"conversations": turns[:1]}, system="drop").detail


def test_reader_metadata_keeps_storable_values():
    deep: Any = 0
    for _ in range(900):
        deep = [deep]
    rest = {"a": {"b": [1, None, 2.5, "ü", True]}, "m": 2**64 - 1}
    lost = {
        "bytes": b"x",
        "date": dataclasses,
        "big": 2**64,
        "inner": [{"x": -(2**63) - 1}],
        "key": {1: 2},
        "deep": deep,
    }
    found = record({"conversations": talk(), **rest, **lost})
    assert found.metadata == rest == Record.from_bytes(found.to_bytes()).metadata == json.loads(json.dumps(rest))
    assert record({"conversations": talk(), "metadata": "x"}).metadata == {"metadata": "x"}
    assert record({"conversations": talk(), "metadata": None}).metadata == {}


@pytest.mark.parametrize(
    "reason, item",
    [
        ("syntax", 5),
        ("syntax", None),
        ("fields", {}),
        ("fields", {"conversations": "hello"}),
        ("fields", {"conversations": []}),
        ("fields", {"conversations": ["hello"]}),
        ("fields", {"conversations": [{"from": "human"}]}),
        ("fields", {"conversations": [{"value": "hello"}]}),
        ("fields", {"conversations": [{"from": 1, "value": "hello"}]}),
        ("fields", {"messages": [{"role": "user", "content": True}]}),
        ("fields", {"messages": [{"role": "user", "content": ["hello"]}]}),
        ("fields", {"messages": [{"role": "user", "content": [{"type": "video"}]}]}),
        ("fields", {"messages": [{"role": "user", "content": [{"type": "text"}]}]}),
        ("image-count", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
        ("fields", {"texts": [{"user": "hello"}]}),
        ("fields", {"question": "what?"}),
        ("fields", {"question": "what?", "answers": []}),
        ("fields", {"question": "what?", "answer": True}),
        ("fields", {"conversations": talk(), "task": " "}),
        ("fields", {"conversations": talk(), "task": 3}),
        ("fields", {"conversations": talk(), "mode": "auto"}),
        ("fields", {"conversations": talk(), "source": {}}),
        ("fields", {"conversations": talk("<image>"), "image": 5}),
        ("fields", {"conversations": talk("<image>"), "image": PNG[0], "images": [PNG[0]]}),
        ("role", {"conversations": [{"from": "tool", "value": "hello"}]}),
        ("role", {"messages": [{"role": "narrator", "content": "hello"}]}),
        ("image-count", {"conversations": talk("<image>")}),
        ("image-count", {"conversations": talk(), "image": PNG[0]}),
        ("image-count", {"conversations": talk("<image>", "<image>"), "image": PNG[0]}),
        ("image-count", {"texts": [{"user": "<image>", "assistant": "a"}], "images": PNG[:2]}),
    ],
)
def test_reader_rejects(reason, item):
    bad = refused(item)
    assert (bad.reason, bad.source, bad.where) == (reason, "made", "made.json, item 7") and len(bad.detail) > 5
    bad.to_line().decode()


@pytest.mark.parametrize(
    "item",
    [
        {"conversations": talk("\ud800")},
        {"conversations": talk(), "metadata": {"x": [["\udc80"]]}},
        {"conversations": talk(), "\ud800": 1},
        {"conversations": talk(), "metadata": {"\ud800": 1}},
        {"conversations": talk(), "id": "\ud800"},
        {"conversations": talk(), "lineage": ["\ud800"]},
    ],
)
def test_check_record_rejects_lone_surrogates(item):
    with pytest.raises(BadRecord) as raised:
        check_record(record(item), decode=False)
    assert raised.value.reason == "encoding"


def test_reader_any_task():
    assert record({"conversations": talk(), "task": "Küchen & more"}).task == "Küchen & more"
    assert refused({"conversations": talk()}, default_mode="refuse").reason == "mode"


def test_item_options_key():
    options = ItemOptions(images=Path("x"), also_allow=(Path("y"),), rename=("a=id",), inline_boxes="unit")
    assert json.loads(json.dumps(options.key())) == options.key()
    assert options.key() != dataclasses.replace(options, images=None).key() != ItemOptions().key()


# ---------------------------------------------------------------------------------------------------------------------
# Coordinates. PNG[0] is 24 x 16.


def shown(text: str, objects: Any = None, images: Any = PNG[:1], **options: Any) -> str:
    item = {"conversations": talk("<image>" * len(images) + text), "images": images, "objects": objects}
    return record(item, **options).messages[0]["content"].replace("<image>", "")


def test_coordinates_by_hand():
    objects = {"ref": ["a cup", "<bbox>"], "bbox": [[6, 4, 12.0, 16], [0, 0, 24, 16]], "point": [[3, 12]]}
    text = "<ref> at <bbox>, <ref> at <point>, all <bbox>"
    expected = "a cup at [0.250, 0.250, 0.500, 1.000], <bbox> at [0.125, 0.750], all [0.000, 0.000, 1.000, 1.000]"
    assert shown(text, objects) == expected
    assert shown("<bbox>", {"bbox": [[100, 200, 300, 1000]]}, boxes="thousand") == "[0.100, 0.200, 0.300, 1.000]"
    assert shown("<point>", {"point": [[0.1, 1]]}, boxes="unit") == "[0.100, 1.000]"
    # 1 % may be missing to the border.
    assert shown("<bbox>", {"bbox": [[-0.24, -0.0, 24.2, 16.1]]}) == "[0.000, 0.000, 1.000, 1.000]"
    # No objects: the text is the text.
    assert shown("a <ref> and a <bbox>") == "a <ref> and a <bbox>"


def test_coordinates_of_several_images():
    wide = png(240, 16)
    objects = {"bbox": [[6, 4, 12, 16], [6, 4, 12, 16]], "point": [[12, 8]], "image_id": [1, 0, 1]}
    text = shown("<bbox> <bbox> <point>", objects, images=[PNG[0], wide])
    assert text == "[0.025, 0.250, 0.050, 1.000] [0.250, 0.250, 0.500, 1.000] [0.050, 0.500]"


def test_coordinates_of_upright_image():
    exif = Image.Exif()
    exif[0x0112] = 6  # 24 x 16 in the file, 16 x 24 as it is seen
    file = io.BytesIO()
    Image.new("RGB", (24, 16)).save(file, "JPEG", exif=exif)
    assert shown("<point>", {"point": [[16, 12]]}, images=[file.getvalue()]) == "[1.000, 0.500]"


def test_coordinates_inline():
    text = "from [0, 0] to [ 12,8.0 ], box [6, 4, 12, 16]; not [1, 2, 3], [1], (3, 4) or [a, b]"
    expected = (
        "from [0.000, 0.000] to [0.500, 0.500], box [0.250, 0.250, 0.500, 1.000]; not [1, 2, 3], [1], (3, 4) or [a, b]"
    )
    assert shown(text, inline_boxes="pixels") == expected
    assert shown(text) == text
    assert shown(text, images=PNG[:2], inline_boxes="pixels") == text
    assert shown("[500, 250] <point>", {"point": [[12, 4]]}, inline_boxes="thousand") == "[0.500, 0.250] [0.500, 0.250]"


@pytest.mark.parametrize(
    "reason, text, objects",
    [
        ("coordinates", "<bbox>", {}),
        ("coordinates", "<bbox>", {"point": [[1, 1]]}),
        ("coordinates", "", {"bbox": [[1, 1, 2, 2]]}),
        ("coordinates", "<ref>", {"ref": ["a", "b"]}),
        ("coordinates", "<bbox>", {"bbox": [[0, 0, 24.3, 10]]}),
        ("coordinates", "<bbox>", {"bbox": [[-0.3, 0, 10, 10]]}),
        ("coordinates", "<point>", {"point": [[1, 17]]}),
        ("coordinates", "<bbox>", {"bbox": [[12, 4, 6, 16]]}),
        ("fields", "<bbox>", {"bbox": [[1, 1, 2]]}),
        ("coordinates", "<point>", {"point": [[float("nan"), 1]]}),
        ("fields", "<point>", {"point": [[10**400, 1]]}),
        ("coordinates", "<point>", {"point": [[1, 1]], "image_id": [1]}),
        ("coordinates", "<point>", {"point": [[1, 1]], "image_id": [0, 0]}),
        ("fields", "<point>", {"point": ["1, 1"]}),
        ("fields", "<point>", {"point": [[True, 1]]}),
        ("fields", "<point>", {"point": {"x": 1}}),
        ("fields", "<ref>", {"ref": [1]}),
        ("fields", "<ref>", ["a"]),
    ],
)
def test_coordinates_rejected(reason, text, objects):
    item = {"conversations": talk("<image>" + text), "image": PNG[0], "objects": objects}
    assert refused(item).reason == reason


def test_coordinates_of_broken_image():
    item = {"conversations": talk("<image><point>"), "image": PNG[0][:20], "objects": {"point": [[1, 1]]}}
    assert refused(item).reason == "image-broken"
    item = {"conversations": talk("<image><image><point>"), "images": PNG[:2], "objects": {"point": [[1, 1]]}}
    assert refused(item).reason == "coordinates"
    assert (
        refused({"conversations": talk("<image>[1, 20]"), "image": PNG[0]}, inline_boxes="pixels").reason
        == "coordinates"
    )


# ---------------------------------------------------------------------------------------------------------------------

WORDS = [
    "<image>",
    "thinking",
    "</think>",
    "<think> </think>",
    "<img>",
    "a.png",
    "gpt",
    "<bbox>",
    "human",
    "user",
    "text",
    "image",
    "think",
    "../x",
    "http://x",
    "data:,",
    "a\0",
]
FIELDS = [
    *("id", "image", "images", "conversations", "messages", "texts", "question", "answer", "answers", "mode", "task"),
    *("source", "metadata", "objects", "from", "value", "role", "content", "type", "text", "user", "assistant", "url"),
    *("weight", "image_url", "bytes", "path", "index", "bbox", "point", "ref", "image_id", "bbox_type", "system"),
    *("options", "reasoning", "loss", "label", "img", "tools", "note", "lineage"),
]
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8)
ODD = st.recursive(
    LEAVES | st.binary(max_size=8) | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300)
@given(ODD)
def test_reader_any_item(item):
    result = read(item, Path("/nonexistent"), boxes="unit", inline_boxes="unit", system="user")
    if isinstance(result, Read):
        with contextlib.suppress(BadRecord):
            check_record(result.record, decode=False)
            assert Record.from_bytes(result.record.to_bytes()) is not None
    else:
        assert json.loads(result.to_line())["reason"]
