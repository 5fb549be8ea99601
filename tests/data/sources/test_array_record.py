from __future__ import annotations

import json
import pickle
from pathlib import Path

import msgpack
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from phivision_jax.data.sources.array_record import ArrayRecordSource
from phivision_jax.data.sources.item_options import ItemOptions
from phivision_jax.data.sources.open_source import open_source
from phivision_jax.data.sources.source import Read
from tests.support.records import make_record, mixed_records, png

OPTIONS = ItemOptions()


def write(path: Path, payloads: list[bytes]) -> Path:
    writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    for payload in payloads:
        writer.write(payload)
    writer.close()
    return path


def ids(source, start: int = 0, stop: int | None = None) -> list[str]:
    results = source.read(start, len(source) if stop is None else stop)
    return [r.record.id if isinstance(r, Read) else f"{r.id}:{r.reason}" for r in results]


def test_array_record_of_records(tmp_path):
    records = [*mixed_records(6), make_record(9, (), metadata={"a": [1, {"b": None}]}, task="math", mode="think")]
    path = write(tmp_path / "made.array_record", [r.to_bytes() for r in records])
    source = pickle.loads(pickle.dumps(ArrayRecordSource(path, OPTIONS)))
    assert source.name == "made" and [r.record for r in source.read(0, 7)] == records
    assert [r.record for r in source.read(2, 5)] == records[2:5]
    assert json.loads(json.dumps(source.key())) == source.key()


def test_array_record_of_json_and_msgpack(tmp_path):
    item = {"id": "r0", "question": "wäs?", "answer": "that"}
    pictured = item | {"id": "r1", "image": png(24, 16)}
    broken = msgpack.packb(item).replace("ä".encode(), b"\xe4\xe4")
    payloads = [
        b"\n " + json.dumps(item, ensure_ascii=False).encode(), msgpack.packb(pictured), broken,
        json.dumps(item, ensure_ascii=False).encode().replace("ä".encode(), b"\xe4"),
        b"\x0a\x7b\x0a\x05hello", b"", b"{", b"\xc1", msgpack.packb(pictured)[:-3], msgpack.packb({1: 2}),
        b"[" * 100_000, msgpack.packb(5), b"{" + b'"a":[' * 100_000,
    ]  # fmt: skip
    path = write(tmp_path / "made.arrayrecord", payloads)
    found = ids(open_source(path, options=OPTIONS))
    assert found == ["r0", "r1", "r0:encoding", "r0:encoding", *(f"made.arrayrecord:{n}:syntax" for n in range(5, 14))]
    bad = next(ArrayRecordSource(path, OPTIONS).read(4, 5))
    assert "TFDS" in bad.detail and bad.where == "made.arrayrecord, payload 5"  # type: ignore[union-attr]


def test_array_record_folder(tmp_path):
    for k in range(3):
        write(
            tmp_path / f"x.array_record-0000{k}-of-00003",
            [make_record(10 * k + i, ()).to_bytes() for i in range(k + 1)],
        )
    source = open_source(tmp_path, options=OPTIONS, name="mine")
    assert source.name == "mine" and ids(source) == ["r000", "r010", "r011", "r020", "r021", "r022"]
    for a in range(7):
        assert ids(source, 0, a) + ids(source, a) == ids(source)


def test_array_record_follows_manifest(tmp_path):
    for name in ("a", "b", "left-over"):
        write(tmp_path / f"{name}.array_record", [make_record(ord(name[0]), ()).to_bytes()])
    shards = [{"file": "b.array_record"}, {"file": "a.array_record"}]
    (tmp_path / "manifest.json").write_text(json.dumps({"shards": shards}))
    (tmp_path / "quarantine.jsonl").write_text("{}\n")
    assert ids(open_source(tmp_path, options=OPTIONS)) == ["r098", "r097"]
    (tmp_path / "b.array_record").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.array_record"):
        open_source(tmp_path, options=OPTIONS)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match=r"manifest\.json: shards must be a list"):
        open_source(tmp_path, options=OPTIONS)


def test_array_record_damaged_files(tmp_path):
    path = write(tmp_path / "made.array_record", [make_record(i, ()).to_bytes() for i in range(40)])
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"r020", b"X020"))
    expected = [f"r{i:03d}" for i in range(40)]
    expected[20] = "made.array_record:21:syntax"
    assert ids(ArrayRecordSource(path, OPTIONS)) == expected
    for content in (b"", b"hello" * 99, raw[: len(raw) // 2]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is not an ArrayRecord file, or is cut short"):
            ArrayRecordSource(path, OPTIONS)


def test_array_record_without_payloads(tmp_path):
    with pytest.raises(ValueError, match=r"no \.array_record file"):
        ArrayRecordSource(tmp_path, OPTIONS)
    with pytest.raises(ValueError, match="has no items"):
        ArrayRecordSource(write(tmp_path / "made.array_record", []), OPTIONS)
