from __future__ import annotations

import io
import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from phivision_jax.data.records import Record
from phivision_jax.data.sources.item_options import ItemOptions
from phivision_jax.data.sources.open_source import open_source
from phivision_jax.data.sources.source import Read
from phivision_jax.data.store import exporting
from phivision_jax.data.store.dataset import Dataset
from phivision_jax.data.store.exporting import export
from tests.support.datasets import write_dataset
from tests.support.records import make_record, mixed_records, png


class Held:
    """The part of a dataset that an export uses."""

    def __init__(self, records: list[Record]) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> Record:
        return self.records[i]


def read_back(out, **options) -> list[Record]:
    source = open_source(out, options=ItemOptions(**options))
    results = list(source.read(0, len(source)))
    assert all(isinstance(r, Read) and r.mode_from == "stated" for r in results), results
    return [r.record for r in results]  # type: ignore[union-attr]


def encoded(format: str, **options) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, format, **options)
    return file.getvalue()


IMAGES = {
    "jpg": encoded("JPEG"),
    "png": png(24, 16),
    "webp": encoded("WEBP"),
    "gif": encoded("GIF"),
    "tif": encoded("TIFF"),
    "bmp": encoded("BMP"),
    "bin": encoded("PPM"),
}
MPO = encoded("MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))])


@pytest.mark.parametrize("format", ["llava", "messages"])
def test_export_round_trip(tmp_path, processor, format):
    records = [*mixed_records(12), make_record(20, (), mode="think", task="math", metadata={"a": [1, {"b": None}]},
               messages=({"role": "system", "content": "be kind"}, {"role": "user", "content": "2+2?"},
                         {"role": "assistant", "content": "5", "weight": 0}, {"role": "user", "content": "no"},
                         {"role": "assistant", "content": "<think>easy</think>4"}))]  # fmt: skip
    dataset = write_dataset(tmp_path / "set", records, processor)
    out = tmp_path / "out"
    assert export(dataset, out, format, progress=False) == 13
    # The defaults of importing do not matter when everything is stated.
    assert read_back(out, default_mode="think", task="ocr") == records == [dataset[i] for i in range(13)]
    again = write_dataset(tmp_path / "again", read_back(out), processor)
    assert again.hash == Dataset.open(tmp_path / "set").hash
    with pytest.raises(FileExistsError, match="out exists"):
        export(dataset, out, format, progress=False)


def test_export_llava_by_hand(tmp_path):
    one = make_record(1, metadata={"n": 1})
    two = make_record(2, ((24, 16), (24, 16)), images=(IMAGES["jpg"], IMAGES["jpg"]))
    export(Held([one, two, make_record(3, ())]), tmp_path / "out", "llava", progress=False)  # type: ignore[arg-type]
    lines = [json.loads(line) for line in (tmp_path / "out" / "data.jsonl").read_text().splitlines()]
    assert lines[0]["conversations"] == [
        {"from": "human", "value": one.messages[0]["content"]},
        {"from": "gpt", "value": "yes"},
    ]
    assert (lines[0]["id"], lines[0]["mode"], lines[0]["task"], lines[0]["source"]) == (
        "r001",
        "nothink",
        "general",
        "made-up",
    )
    assert lines[0]["metadata"] == {"n": 1} and isinstance(lines[0]["image"], str)
    assert lines[1]["image"] == lines[1]["image"][:1] * 2 and "image" not in lines[2]
    files = [p.relative_to(tmp_path / "out") for p in (tmp_path / "out" / "images").rglob("*.*")]
    assert sorted(map(str, files)) == sorted({lines[0]["image"], lines[1]["image"][0]}), "each image once"
    assert [p.suffix for p in files if str(p) == lines[1]["image"][0]] == [".jpg"]


def test_export_messages_by_hand(tmp_path):
    asked = [{"role": "user", "content": "a <image>\nb"}, {"role": "assistant", "content": "yes"}]
    parts = make_record(1, messages=tuple(asked))
    marker = make_record(2, messages=({"role": "user", "content": "<image>b"}, asked[1]))
    export(Held([parts, marker]), tmp_path / "out", "messages", progress=False)  # type: ignore[arg-type]
    one, two = (json.loads(line) for line in (tmp_path / "out" / "data.jsonl").read_text().splitlines())
    path = one["messages"][0]["content"][1].pop("image")
    assert one["messages"][0]["content"] == [
        {"type": "text", "text": "a "}, {"type": "image"}, {"type": "text", "text": "b"},
    ]  # fmt: skip
    assert (tmp_path / "out" / path).read_bytes() == parts.images[0] and "images" not in one
    assert two["messages"] == list(marker.messages) and len(two["images"]) == 1


def test_export_keeps_image_bytes(tmp_path):
    images = (*IMAGES.values(), MPO, b"not an image", b"")
    record = make_record(0, messages=({"role": "user", "content": "<image>" * len(images)},), images=images)
    export(Held([record]), tmp_path / "out", "llava", progress=False)  # type: ignore[arg-type]
    paths = json.loads((tmp_path / "out" / "data.jsonl").read_text())["image"]
    assert [path.partition(".")[2] for path in paths] == [*IMAGES, "jpg", "bin", "bin"]
    assert read_back(tmp_path / "out") == [record]


def test_export_is_atomic(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(exporting, "_save", fail)
        export(Held(mixed_records(3)), tmp_path / "out", "llava", progress=False)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".out.partial-0").mkdir()  # of a killed process
    (tmp_path / ".out.partial-0" / "left").write_text("over")
    export(Held(mixed_records(3)), tmp_path / "out", "llava", progress=False)  # type: ignore[arg-type]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["data.jsonl", "images"]
    assert read_back(tmp_path / "out") == mixed_records(3)


text = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("\n\r\u2028\ufeff<>"), max_size=12)
pieces = st.lists(
    text | st.sampled_from(["<image>", "<image>\n", "<ima", "ge>\n", "\n", "<think>", "<bbox>", " <think>"]), max_size=6
)
contents = pieces.map("".join)
simple = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | text
nested = st.recursive(
    simple, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3), max_leaves=6
)
metadata = st.dictionaries(text, nested, max_size=4)


@st.composite
def records(draw) -> Record:
    roles = draw(st.lists(st.sampled_from(["user", "assistant", "system"]), min_size=1, max_size=5))
    messages: tuple[dict[str, Any], ...] = tuple({"role": role, "content": draw(contents)} for role in roles)
    count = sum(m["content"].count("<image>") for m in messages)
    for message in messages:
        if message["role"] == "assistant":
            # As an import leaves it, and with weights.
            if message["content"].lstrip().startswith("<think>"):
                message["content"] = message["content"].lstrip()
            message |= draw(st.sampled_from([{}, {"weight": 0}]))
    return Record(
        id=draw(text.filter(bool)),
        source=draw(text),
        images=tuple(draw(st.sampled_from([*IMAGES.values(), b"", b"x"])) for _ in range(count)),
        messages=messages,
        mode=draw(st.sampled_from(["think", "nothink"])),
        task=draw(st.sampled_from(["general", "gui"])),
        metadata=draw(metadata),
    )


@settings(max_examples=120)
@given(st.lists(records(), min_size=1, max_size=3), st.sampled_from(["llava", "messages"]))
@example([make_record(0, messages=({"role": "user", "content": "<image><image>\n"},), images=(b"a", b"b"))], "messages")
@example(
    [make_record(0, (), messages=({"role": "assistant", "content": ""},), metadata={"metadata": {"id": 5}})], "llava"
)
def test_export_round_trip_of_any_record(tmp_path_factory, originals, format):
    out = tmp_path_factory.mktemp("x") / "out"
    export(Held(originals), out, format, progress=False)  # type: ignore[arg-type]
    assert read_back(out) == originals
