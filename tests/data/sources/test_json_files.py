from __future__ import annotations

import gzip
import io
import json
import pickle
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
def test_one_file(kind, tmp_path):
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


def test_a_folder_and_several_files(tmp_path):
    for name, ids in (("train-b.jsonl", (3, 4)), ("train-a.json", (0, 1, 2)), ("test.jsonl", (9,))):
        items = [item(i) for i in ids]
        (tmp_path / name).write_bytes(as_lines(items) if name.endswith("l") else as_array(items))
    (tmp_path / "dataset_info.json").write_text("{}")
    source = JsonSource(tmp_path, OPTIONS, name="both")
    assert source.name == "both" and brief(read(source)) == ["r0", "r1", "r2", "r3", "r4"]
    assert brief(read(source, 2, 4)) == ["r2", "r3"]
    assert brief(read(JsonSource(tmp_path, OPTIONS, split="test"))) == ["r9"]
    assert brief(read(JsonSource([tmp_path / "test.jsonl", tmp_path / "train-a.json"], OPTIONS))) == [
        "r9",
        "r0",
        "r1",
        "r2",
    ]
    with pytest.raises(ValueError, match=r"of split 'dev', only test.jsonl, train-a.json, train-b.jsonl"):
        JsonSource(tmp_path, OPTIONS, split="dev")


@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_under_a_name_for_lines(indent, tmp_path):
    content = json.dumps([item(i) for i in range(3)], indent=indent) + "\n"
    source = source_of(content, tmp_path / "made.jsonl")
    assert brief(read(source)) == ["r0", "r1", "r2"]
    assert read(source, 1, 2)[0].where.startswith("made.jsonl, item 2")
    # A list on its line is one bad item.
    lines = b"[1, 2]\n" + as_lines([item(1)])
    assert brief(read(source_of(lines, tmp_path / "made.jsonl"))) == ["made.jsonl:1:syntax", "r1"]
    assert brief(read(source_of(b"[" * 200_000 + b"\n" + lines, tmp_path / "made.jsonl")))[2:] == ["r1"]


def test_one_object_with_the_items_inside(tmp_path):
    (bad,) = read(source_of(json.dumps({"version": 1, "data": [item(i) for i in range(3)]}), tmp_path / "made.json"))
    assert isinstance(bad, Quarantined) and bad.reason == "fields"
    assert bad.detail.endswith("if the 3 objects under 'data' are the items, make a file of that list alone")


def test_the_key_changes_with_the_content_and_the_options(tmp_path):
    source = source_of(as_lines([item(0)]), tmp_path / "a.jsonl")
    assert json.loads(json.dumps(source.key())) == source.key()
    assert JsonSource(tmp_path / "a.jsonl", OPTIONS).key() == source.key()
    assert JsonSource(tmp_path / "a.jsonl", ItemOptions(task="ocr")).key() != source.key()
    assert source_of(as_lines([item(0), item(1)]), tmp_path / "a.jsonl").key() != source.key()


def test_broken_lines_cost_themselves(tmp_path):
    lines = as_lines([item(i) for i in range(12)]).splitlines(keepends=True)
    lines[1] = lines[1][:30] + b"\n"
    lines[2] = lines[2].replace("ä".encode(), b"\xe4")
    lines[3] = b"\x00\x01\x02\xff\n"
    lines[4] = b"[" * 200_000 + b"\n"
    lines[5] = b'{"uid": 55, "n": ' + b"1" * 5000 + b"}\n"
    lines[6] = lines[6].replace(b"what", b"\\ud800")
    lines[7] = b"17\n"
    lines[8] = lines[8].replace(b"r8", b"\xff8")
    lines[9] = lines[9].rstrip()[:-1] + b", 'x'}\n"
    lines[11] = lines[11][:-9]
    source = source_of(b"".join(lines), tmp_path / "made.jsonl")
    assert brief(read(source)) == [
        "r0", "r1:syntax", "r2:encoding", "made.jsonl:4:encoding", "made.jsonl:5:syntax", "55:syntax", "r6:encoding",
        "made.jsonl:8:syntax", "\ufffd8:encoding", "r9:syntax", "r10", "r11:syntax",
    ]  # fmt: skip
    assert all(r.where == f"made.jsonl, line {n}" for n, r in enumerate(read(source), start=1))


def test_a_broken_line_is_named_by_a_renamed_id(tmp_path):
    broken = b'{"number": 5, "conversations": \n'
    source = source_of(broken, tmp_path / "a.jsonl", ItemOptions(rename=("number=id",)))
    assert brief(read(source)) == ["5:syntax"]


def test_a_line_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(json_files, "WINDOW", 300)
    lines = [item(0), item(1, x="y" * 1000), item(2)]
    assert brief(read(source_of(as_lines(lines), tmp_path / "a.jsonl"))) == ["r0", "r1:syntax", "r2"]
    assert brief(read(source_of(as_array(lines), tmp_path / "a.json"))) == ["r0", "r1:syntax", "r2"]


ARRAY = as_array([item(i) for i in range(6)])


@pytest.mark.parametrize(
    "damage, expected",
    [
        (lambda raw: raw.replace(b'"id": "r2', b'"id: "r2'), ["r0", "r1", "?:3:syntax", "r3", "r4", "r5"]),
        (lambda raw: raw.replace(b'"r2", ', b'"r2" '), ["r0", "r1", "r2:syntax", "r3", "r4", "r5"]),
        (lambda raw: raw.replace(b'"r2",', b'"r2",,'), ["r0", "r1", "r2:syntax", "r3", "r4", "r5"]),
        # The brackets of item 2 do not close: all that follows would be inside it.
        (lambda raw: raw.replace(b']}, {"id": "r3', b', {"id": "r3'), ["r0", "r1", "r2:syntax", "r3", "r4", "r5"]),
        # One bracket too many: the array would end there.
        (lambda raw: raw.replace(b'{"id": "r2', b'] {"id": "r2'), ["r0", "r1", "r2:syntax"]),
        (lambda raw: raw.replace(b'{"id": "r2', b'"id": "r2'), ["r0", "r1", "r2:syntax", "r3", "r4", "r5"]),
        (lambda raw: raw.replace(b', {"id": "r3', b' {"id": "r3'), ["r0", "r1", "r2", "r3", "r4", "r5"]),
        (
            lambda raw: raw.replace(b', {"id": "r3', b' junk, {"id": "r3'),
            ["r0", "r1", "r2", "?:4:syntax", "r3", "r4", "r5"],
        ),
        (
            lambda raw: raw.replace(b'{"id": "r3', b'7, null, {"id": "r3'),
            ["r0", "r1", "r2", "?:4:syntax", "?:5:syntax", "r3", "r4", "r5"],
        ),
        (lambda raw: raw.replace("ä".encode(), b"\xe4", 2), ["r0:encoding", "r1:encoding", "r2", "r3", "r4", "r5"]),
        (lambda raw: raw[: raw.index(b'"r4') + 20], ["r0", "r1", "r2", "r3", "r4:syntax"]),
        (lambda raw: raw[: raw.index(b'{"id": "r4')], ["r0", "r1", "r2", "r3", "?:5:syntax"]),
        (lambda raw: raw[:-1], ["r0", "r1", "r2", "r3", "r4", "r5", "?:7:syntax"]),
        (lambda raw: raw[:-1] + b",]", ["r0", "r1", "r2", "r3", "r4", "r5"]),
        (lambda raw: raw + b"\n" + raw, ["r0", "r1", "r2", "r3", "r4", "r5", "r0:syntax"]),
    ],
)  # fmt: skip
def test_broken_arrays(damage, expected, tmp_path, monkeypatch):
    raw = damage(ARRAY)
    whole = None
    for window in (64 * 2**20, 400, 90):
        source = source_of(raw, tmp_path / "made.json")
        results = read(source)
        assert brief(results) == [e.replace("?", "made.json") for e in expected]
        assert whole is None or results == whole
        whole = results
        pieces = list(elements(io.BytesIO(raw), 1, window))
        assert pieces == list(elements(io.BytesIO(raw), 1, 1))
        # Reading may begin at any of the pieces.
        for k, piece in enumerate(pieces):
            assert list(elements(io.BytesIO(raw), piece.offset, window)) == pieces[k:]


def test_items_are_found_again_by_renamed_fields(tmp_path):
    raw = (
        json.dumps([{"id": i, "prompt": "x", "answer": "y"} for i in range(4)]).replace('"id": 1,', '"id": 1').encode()
    )
    renamed = ItemOptions(rename=("prompt=question",))
    assert brief(read(source_of(raw, tmp_path / "a.json", renamed))) == ["0", "1:syntax", "2", "3"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=10)
    | st.sampled_from(['"', "\\", "}, {", "]", "ä", "\u2028", "-Infinity", "\\u00"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=15,
)  # fmt: skip


@settings(max_examples=200)
@given(st.lists(json_values, max_size=6), st.integers(1, 40), st.booleans(), st.sampled_from([None, 1]))
def test_any_array_is_split_as_json_reads_it(values, window, ascii, indent):
    raw = json.dumps(values, ensure_ascii=ascii, indent=indent).encode(errors="replace")
    pieces = list(elements(io.BytesIO(raw), raw.index(b"[") + 1, window))
    assert [p.problem for p in pieces] == [None] * len(values)
    assert [json.loads(p.raw) for p in pieces] == json.loads(raw)
    assert all(raw[p.offset :].startswith(p.raw) for p in pieces)


@settings(max_examples=150)
@given(st.integers(0, len(ARRAY)), st.integers(0, 40), st.binary(max_size=5), st.integers(1, 60))
def test_however_an_array_is_damaged_the_window_does_not_matter(at, cut, put, window):
    raw = ARRAY[:at] + put + ARRAY[at + cut :]
    pieces = list(elements(io.BytesIO(raw), 1, window))
    assert pieces == list(elements(io.BytesIO(raw), 1, 10**6))
    offsets = [p.offset for p in pieces]
    assert offsets == sorted(set(offsets))
    # What the damage did not touch, nor the comma before it, is found, but for what an early ] leaves behind the array.
    if b"]" not in put and b"]" not in ARRAY[at : at + cut] and not pieces[-1].problem:
        begins = [ARRAY.index(f'{{"id": "r{i}'.encode()) for i in range(6)]
        untouched = [
            i
            for i, (a, b) in enumerate(zip(begins, [*begins[1:], len(ARRAY)], strict=True))
            if b <= at or a > at + cut + 1
        ]
        found = [
            json.loads(p.raw)["id"] for p in pieces if p.raw in ARRAY and p.raw.startswith(b'{"id"') and not p.problem
        ]
        assert set(found) >= {f"r{i}" for i in untouched if i > 0}


@settings(max_examples=25)
@given(st.data())
def test_ranges_add_up(tmp_path_factory, data):
    n = data.draw(st.integers(1, 40))
    rng = np.random.default_rng(data.draw(st.integers(0, 100)))
    lines = as_lines([item(i) for i in range(n)]).splitlines(keepends=True)
    # Not the first: what is left of it may look like an object over several lines, which is another error.
    for i in set(rng.choice(n, n // 4, replace=False)) - {0}:
        lines[i] = lines[i][: rng.integers(1, len(lines[i]) - 1)] + b"\n"
    folder = tmp_path_factory.mktemp("x")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_files, "EVERY", 4)
        if data.draw(st.booleans()):
            source = source_of(b"".join(lines), folder / "a.jsonl")
        else:
            source = source_of(b"[" + b",".join(lines) + b"]", folder / "a.json")
        whole = read(source)
        a, b = sorted(data.draw(st.tuples(*[st.integers(0, len(source))] * 2)))
        assert len(whole) == len(source)
        assert read(source, 0, a) + read(source, a, b) + read(source, b) == whole


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("a.json", "", "holds no items"),
        ("a.json", "[]", "holds no items"),
        ("a.jsonl", "\n \n", "holds no items"),
        (
            "a.json",
            '{\n "data": []\n}',
            r"one object over several lines: .*make a file of that list alone \(jq \.data\)",
        ),
        ("a.jsonl", '{"data": [\r\n {"id": 1}\r\n]}', "one object over several lines"),
        ("a.jsonl", gzip.compress(b"{}"), "compressed: unpack it first"),
        ("a.json", "[]".encode("utf-16"), "UTF-16"),
    ],
)
def test_files_that_cannot_be(tmp_path, name, content, says):
    with pytest.raises(ValueError, match=says):
        source_of(content, tmp_path / name)


def test_a_file_that_shrinks_is_not_read_short(tmp_path):
    source = source_of(as_lines([item(i) for i in range(4)]), tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_bytes(as_lines([item(0)]))
    with pytest.raises(ValueError, match="has changed"):
        read(source)


def test_a_piece_by_hand():
    assert list(elements(io.BytesIO(b'[1, "a" ]'), 1, 2)) == [Piece(1, b"1"), Piece(4, b'"a"')]
