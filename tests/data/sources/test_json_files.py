from __future__ import annotations

import gzip
import io
import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phivision_jax.data.quarantine import Quarantined
from phivision_jax.data.sources import json_files
from phivision_jax.data.sources.item_options import ItemOptions
from phivision_jax.data.sources.json_files import JsonSource, Piece, elements
from phivision_jax.data.sources.source import Read
from tests.support.records import png

PNG = png(24, 16)
OPTIONS = ItemOptions()


def item(i: int, **fields: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"what is {i}?"}, {"from": "gpt", "value": "häßlich}, {[\\"}]
    return {"id": f"r{i}", "conversations": turns, **fields}


def source_of(content: str | bytes, path: Path, options: ItemOptions = OPTIONS) -> JsonSource:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return pickle.loads(pickle.dumps(JsonSource(path, options)))


def read(source: JsonSource, start: int = 0, stop: int | None = None) -> list[Read | Quarantined]:
    return list(source.read(start, len(source) if stop is None else stop))


def brief(results: list[Read | Quarantined]) -> list[str]:
    """The ids of records, id and reason of the bad."""
    return [r.record.id if isinstance(r, Read) else f"{r.id}:{r.reason}" for r in results]


def as_array(items: list[Any]) -> bytes:
    return json.dumps(items, ensure_ascii=False).encode()


def as_lines(items: list[Any]) -> bytes:
    return b"".join(json.dumps(i, ensure_ascii=False).encode() + b"\n" for i in items)


@pytest.mark.parametrize("kind", ["array", "pretty", "lines", "lines in .json", "windows", "bom array", "bom lines"])
def test_json_source_reads_one_file(kind, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").write_bytes(PNG)
    items = [item(i) for i in range(9)]
    items[4] = {"image": "images/1.png", "conversations": [{"from": "human", "value": "<image>"}]}
    if "array" in kind:
        content, name = as_array(items), "made.json"
    elif kind == "pretty":
        content, name = b"\n\n " + json.dumps(items, indent=2).encode() + b"\n", "made.json"
    else:
        content, name = as_lines(items), "made.json" if kind.endswith(".json") else "made.jsonl"
    if "bom" in kind:
        content = b"\xef\xbb\xbf" + content
    if kind == "windows":
        content = b"\r\n  \r\n" + content.replace(b"\n", b"\r\n\r\n").rstrip()
    source = source_of(content, tmp_path / name)
    results = read(source)
    assert source.name == "made" and len(source) == 9
    assert brief(results) == ["r0", "r1", "r2", "r3", f"{name}:5", "r5", "r6", "r7", "r8"]
    assert isinstance(results[4], Read) and results[4].record.images == (PNG,)
    assert results[0].record.messages[1]["content"] == "häßlich}, {[\\"  # type: ignore[union-attr]
    if name == "made.jsonl":
        assert results[2].where == f"made.jsonl, line {7 if kind == 'windows' else 3}"
    else:
        assert results[2].where.startswith("made.json, item 3" if "lines" not in kind else "made.json, line 3")


def test_json_source_reads_folder(tmp_path):
    for name, ids in (("train-b.jsonl", (3, 4)), ("train-a.json", (0, 1, 2)), ("test.jsonl", (9,))):
        items = [item(i) for i in ids]
        (tmp_path / name).write_bytes(as_lines(items) if name.endswith("l") else as_array(items))
    (tmp_path / "dataset_info.json").write_text("{}")
    source = JsonSource(tmp_path, OPTIONS, name="both")
    assert source.name == "both" and brief(read(source)) == ["r0", "r1", "r2", "r3", "r4"]
    assert brief(read(source, 2, 4)) == ["r2", "r3"]
    assert brief(read(JsonSource(tmp_path, OPTIONS, split="test"))) == ["r9"]
    with pytest.raises(ValueError, match=r"of split 'dev', only test.jsonl, train-a.json, train-b.jsonl"):
        JsonSource(tmp_path, OPTIONS, split="dev")


@pytest.mark.parametrize("indent", [None, 2])
def test_json_source_array_named_jsonl(indent, tmp_path):
    content = json.dumps([item(i) for i in range(3)], indent=indent) + "\n"
    source = source_of(content, tmp_path / "made.jsonl")
    assert brief(read(source)) == ["r0", "r1", "r2"]
    assert read(source, 1, 2)[0].where.startswith("made.jsonl, item 2")
    # A list on a line is one bad item.
    lines = b"[1, 2]\n" + as_lines([item(1)])
    assert brief(read(source_of(lines, tmp_path / "made.jsonl"))) == ["made.jsonl:1:syntax", "r1"]
    assert brief(read(source_of(b"[" * 200_000 + b"\n" + lines, tmp_path / "made.jsonl")))[2:] == ["r1"]


def test_json_source_object_around_items(tmp_path):
    (bad,) = read(source_of(json.dumps({"version": 1, "data": [item(i) for i in range(3)]}), tmp_path / "made.json"))
    assert isinstance(bad, Quarantined) and bad.reason == "fields"
    assert bad.detail.endswith("if the 3 objects under 'data' are the items, make a file of that list alone")


def test_json_source_key(tmp_path):
    source = source_of(as_lines([item(0)]), tmp_path / "a.jsonl")
    assert json.loads(json.dumps(source.key())) == source.key()
    assert JsonSource(tmp_path / "a.jsonl", OPTIONS).key() == source.key()
    assert JsonSource(tmp_path / "a.jsonl", ItemOptions(task="ocr")).key() != source.key()
    assert source_of(as_lines([item(0), item(1)]), tmp_path / "a.jsonl").key() != source.key()


def test_broken_lines_are_quarantined_one_by_one(tmp_path):
    lines = as_lines([item(i) for i in range(12)]).splitlines(keepends=True)
    lines[1] = lines[1][:30] + b"\n"
    lines[2] = lines[2].replace("ä".encode(), b"\xe4")
    lines[3] = b"\x00\x01\x02\xff\n"
    lines[4] = b"[" * 200_000 + b"\n"
    lines[5] = b'{"uid": 55, "n": ' + b"1" * 5000 + b"}\n"
    lines[6] = lines[6].replace(b"what", b"\\ud800")  # left to the check of records
    lines[7] = b"17\n"
    lines[8] = lines[8].replace(b"r8", b"\xff8")
    lines[9] = lines[9].rstrip()[:-1] + b", 'x'}\n"
    lines[11] = lines[11][:-9]
    source = source_of(b"".join(lines), tmp_path / "made.jsonl")
    assert brief(read(source)) == [
        "r0", "r1:syntax", "r2:encoding", "made.jsonl:4:encoding", "made.jsonl:5:syntax", "55:syntax", "r6",
        "made.jsonl:8:syntax", "\ufffd8:encoding", "r9:syntax", "r10", "r11:syntax",
    ]  # fmt: skip
    assert all(r.where == f"made.jsonl, line {n}" for n, r in enumerate(read(source), start=1))


def test_broken_line_shows_renamed_id(tmp_path):
    broken = b'{"number": 5, "conversations": \n'
    source = source_of(broken, tmp_path / "a.jsonl", ItemOptions(rename=("number=id",)))
    assert brief(read(source)) == ["5:syntax"]


def test_item_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(json_files, "LARGEST", 300)
    items = [item(0), item(1, x='y\\", ]}' * 300), item(2), item(3, x=["{"] * 300)]
    for large, content in (
        (64, as_lines(items)),
        (64, as_array(items)),
        (70, as_array(items)),
        (3000, as_array(items)),
    ):
        monkeypatch.setattr(json_files, "LARGE", large)
        source = source_of(content, tmp_path / "a.json")
        assert brief(read(source)) == ["r0", "r1:syntax", "r2", "r3:syntax"]
        assert all("longer than 300 bytes" in read(source)[k].detail for k in (1, 3))  # type: ignore[union-attr]


ARRAY = as_array([item(i) for i in range(6)])


@pytest.mark.parametrize(
    "damage, element, problem",
    [
        (lambda raw: raw.replace(b'"id": "r2', b'"id: "r2'), "r2", "Expecting"),
        (lambda raw: raw.replace(b'"r2", ', b'"r2" '), "r2", "Expecting ',' delimiter"),
        (lambda raw: raw.replace(b'"r2",', b'"r2",,'), "r2", "Expecting"),
        (lambda raw: raw.replace(b']}, {"id": "r3', b', {"id": "r3'), "r2", "Expecting"),
        (lambda raw: raw.replace(b'{"id": "r2', b'] {"id": "r2'), "r2", "Expecting"),
        (lambda raw: raw.replace(b'{"id": "r2', b'"id": "r2'), "r2", "neither a comma nor ]"),
        (lambda raw: raw.replace(b', {"id": "r3', b' {"id": "r3'), "r2", "neither a comma nor ]"),
        (lambda raw: raw.replace(b', {"id": "r3', b' junk, {"id": "r3'), "r2", "neither a comma nor ]"),
        (lambda raw: raw[: raw.index(b'"r4') + 20], "r4", "Expecting|Unterminated"),
        (lambda raw: raw[: raw.index(b'{"id": "r4')], None, "no closing bracket"),
        (lambda raw: raw[:-1], "r5", "neither a comma nor ]"),
        (lambda raw: raw[:-1] + b",]", None, "Expecting value"),
        (lambda raw: raw + b"\n" + raw, None, "text after the end of the array"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("window", [64 * 2**20, 90])
def test_array_with_broken_syntax_is_one_error(damage, element, problem, window, tmp_path, monkeypatch):
    """It is not certain where the next item begins, so none is skipped: the error has the position."""
    raw = damage(ARRAY)
    (tmp_path / "made.json").write_bytes(raw)
    with pytest.raises(ValueError, match=problem) as raised, (tmp_path / "made.json").open("rb") as file:
        list(elements(file, 1, window))
    with pytest.raises(ValueError, match=re.escape(str(raised.value))):
        JsonSource(tmp_path / "made.json", OPTIONS)
    if element:
        offset = raw.index(element.encode())
        found = re.search(r"at byte (\d+)", str(raised.value))
        assert found and 0 <= offset - int(found[1]) <= len(b'] {"id": "')


def test_array_with_broken_utf8_loses_one_item(tmp_path):
    raw = ARRAY.replace("ä".encode(), b"\xe4", 2)
    assert brief(read(source_of(raw, tmp_path / "made.json"))) == ["r0:encoding", "r1:encoding", "r2", "r3", "r4", "r5"]


@pytest.mark.parametrize("large", [2000, 10**7])
def test_array_items_beyond_decoding_are_quarantined(large, tmp_path, monkeypatch):
    """Nesting, and a number of many digits, are beyond Python's decoder, though JSON allows both."""
    monkeypatch.setattr(json_files, "LARGE", large)
    deep, digits = b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", b'{"uid": 7, "n": ' + b"9" * 10**6 + b"}"
    raw = ARRAY.replace(b'{"id": "r1', deep + b', {"id": "r1').replace(b'{"id": "r3', digits + b', {"id": "r3')
    expected = ["r0", "made.json:2:syntax", "r1", "r2", "7:syntax", "r3", "r4", "r5"]
    source = source_of(raw, tmp_path / "made.json")
    assert brief(read(source)) == expected
    assert brief(read(source, 2, 6)) == expected[2:6]
    assert "beyond what can be decoded" in read(source)[1].detail  # type: ignore[union-attr]


def test_array_items_that_are_no_objects(tmp_path):
    raw = ARRAY.replace(b'{"id": "r3', b'7, null, {"id": "r3')
    expected = ["r0", "r1", "r2", "made.json:4:syntax", "made.json:5:syntax", "r3", "r4", "r5"]
    assert brief(read(source_of(raw, tmp_path / "made.json"))) == expected


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=10)
    | st.sampled_from(['"', "\\", "}, {", "]", "ä", "\u2028", "-Infinity", "\\u00"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=15,
)  # fmt: skip


@settings(max_examples=200)
@given(st.lists(json_values, max_size=6), st.integers(1, 40), st.booleans(), st.sampled_from([None, 1]))
def test_elements_splits_any_array(values, window, ascii, indent):
    raw = json.dumps(values, ensure_ascii=ascii, indent=indent).encode(errors="replace")
    pieces = list(elements(io.BytesIO(raw), raw.index(b"[") + 1, window))
    assert [json.loads(p.raw) for p in pieces] == json.loads(raw)
    assert all(raw[p.offset :].startswith(p.raw) for p in pieces)
    for k, piece in enumerate(pieces):  # reading may begin at any of them
        assert list(elements(io.BytesIO(raw), piece.offset, window)) == pieces[k:]


@settings(max_examples=150)
@given(st.integers(0, len(ARRAY)), st.integers(0, 40), st.binary(max_size=5), st.integers(1, 60))
def test_elements_window_does_not_matter(start, length, new, window):
    """A damaged array is read like an intact one, or is an error, through any window."""
    raw = ARRAY[:start] + new + ARRAY[start + length :]

    def outcome(window: int) -> list[Piece] | None:
        file = io.BytesIO(raw)
        file.name = "made.json"
        try:
            return list(elements(file, 1, window))
        except ValueError:
            return None

    found = outcome(window)
    assert found == outcome(10**6)
    try:
        intact = json.loads(raw.decode("latin-1")) if raw[:1] == b"[" else found
    except ValueError:
        intact = None
    assert (found is None) == (intact is None), "an error exactly where JSON is broken"


@settings(max_examples=25)
@given(st.data())
def test_json_source_ranges_add_up(tmp_path_factory, data):
    n = data.draw(st.integers(1, 40))
    rng = np.random.default_rng(data.draw(st.integers(0, 100)))
    lines = as_lines([item(i) for i in range(n)]).splitlines(keepends=True)
    # Not the first: its rest may look like an object over several lines, which is another error.
    for i in set(rng.choice(n, n // 4, replace=False)) - {0}:
        lines[i] = lines[i][: rng.integers(1, len(lines[i]) - 1)] + b"\n"
    folder = tmp_path_factory.mktemp("x")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_files, "EVERY", 4)
        if data.draw(st.booleans()):
            source = source_of(b"".join(lines), folder / "a.jsonl")
        else:
            source = source_of(as_array([item(i) for i in range(n)]), folder / "a.json")
        expected = read(source)
        a, b = sorted(data.draw(st.tuples(*[st.integers(0, len(source))] * 2)))
        assert len(expected) == len(source)
        assert read(source, 0, a) + read(source, a, b) + read(source, b) == expected


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.json", "", "has no items"),
        ("a.json", "[]", "has no items"),
        ("a.jsonl", "\n \n", "has no items"),
        (
            "a.json",
            '{\n "data": []\n}',
            r"one object over several lines: .*make a file of that list alone \(jq \.data\)",
        ),
        ("a.jsonl", '{"data": [\r\n {"id": 1}\r\n]}', "one object over several lines"),
        ("a.jsonl", gzip.compress(b"{}", mtime=0), "compressed: unpack it first"),
        ("a.json", "[]".encode("utf-16"), "UTF-16"),
    ],
)
def test_json_source_rejects_file(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        source_of(content, tmp_path / name)


def test_json_source_notices_changed_file(tmp_path):
    source = source_of(as_lines([item(i) for i in range(4)]), tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_bytes(as_lines([item(0)]))
    with pytest.raises(ValueError, match="has changed"):
        read(source)


def test_elements_by_hand():
    assert list(elements(io.BytesIO(b'[1, "a" ]'), 1, 2)) == [Piece(1, b"1"), Piece(4, b'"a"')]
