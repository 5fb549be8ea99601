"""Files as Hugging Face's ``datasets`` writes them: its Image feature is struct<bytes: binary, path: string>."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phivision_jax.data.quarantine import Quarantined
from phivision_jax.data.sources import parquet, row_groups
from phivision_jax.data.sources.item_options import ItemOptions
from phivision_jax.data.sources.parquet import ParquetSource
from phivision_jax.data.sources.source import Read
from tests.support.paths import ROOT
from tests.support.records import png

PNG = [png(24, 16, seed) for seed in range(3)]
IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
OPTIONS = ItemOptions()


def open_(path: Path, options: ItemOptions = OPTIONS, **kwargs: Any) -> ParquetSource:
    return pickle.loads(pickle.dumps(ParquetSource(path, options, **kwargs)))


def read(source: ParquetSource, start: int = 0, stop: int | None = None) -> list[Read | Quarantined]:
    return list(source.read(start, len(source) if stop is None else stop))


def ids(results: list[Read | Quarantined]) -> list[str]:
    return [r.record.id if isinstance(r, Read) else f"{r.id}:{r.reason}" for r in results]


def questions(first: int, n: int) -> pa.Table:
    return pa.table(
        {"id": [f"r{i}" for i in range(first, first + n)], "question": ["what?"] * n, "answer": ["that"] * n}
    )


def test_messages_with_image_structs(tmp_path):
    (tmp_path / "2.png").write_bytes(PNG[2])
    part = pa.struct({"type": pa.string(), "text": pa.string(), "index": pa.int64()})
    messages = pa.list_(pa.struct({"role": pa.string(), "content": pa.list_(part)}))
    user = [{"type": "image", "index": 0}, {"type": "image", "index": 1}, {"type": "text", "text": "wäs?"}]
    rows = [
        {
            "messages": [
                {"role": "user", "content": user},
                {"role": "assistant", "content": [{"type": "text", "text": "that"}]},
            ],
            "images": [{"bytes": PNG[0], "path": "elsewhere.jpg"}, {"bytes": None, "path": "2.png"}],
            "score": 0.5,
        },
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "and?"}]}], "images": [], "score": None},
    ]
    schema = pa.schema({"messages": messages, "images": pa.list_(IMAGE), "score": pa.float64()})
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp_path / "made.parquet")
    one, two = read(open_(tmp_path / "made.parquet"))
    assert isinstance(one, Read) and isinstance(two, Read)
    assert one.record.images == (PNG[0], PNG[2]) and one.record.metadata == {"score": 0.5}
    assert one.record.messages[0]["content"] == "<image>\n<image>\nwäs?"
    assert (one.record.id, one.record.source, one.where) == ("made.parquet:1", "made", "made.parquet, row 1")
    assert two.record.images == ()


def test_parquet_cauldron_and_llava(tmp_path):
    texts = [[{"user": "what?", "assistant": "that", "source": "x"}]]
    table = pa.table(
        {
            "images": pa.array([[{"bytes": PNG[0], "path": None}]], pa.list_(IMAGE)),
            "texts": pa.array(texts, pa.list_(pa.struct({k: pa.string() for k in texts[0][0]}))),
        }
    )
    pq.write_table(table, tmp_path / "cauldron.parquet")
    (one,) = read(open_(tmp_path / "cauldron.parquet"))
    assert isinstance(one, Read) and one.record.images == (PNG[0],)
    # A Sequence of dicts is a struct of lists; an image may be bare bytes.
    turns = pa.struct({"from": pa.list_(pa.string()), "value": pa.list_(pa.large_string())})
    table = pa.table(
        {
            "image": pa.array([PNG[1]], pa.binary()),
            "conversations": pa.array([{"from": ["human", "gpt"], "value": ["<image>what?", "that"]}], turns),
        }
    )
    pq.write_table(table, tmp_path / "llava.parquet")
    (one,) = read(open_(tmp_path / "llava.parquet"))
    assert isinstance(one, Read) and one.record.images == (PNG[1],) and len(one.record.messages) == 2


def test_parquet_folder(tmp_path):
    folder = tmp_path / "made" / "data"
    folder.mkdir(parents=True)
    for k, n in enumerate((5, 3)):
        pq.write_table(questions(10 * k, n), folder / f"train-0000{k}-of-00002.parquet", row_group_size=2)
    pq.write_table(questions(90, 1), folder / "test-00000-of-00001.parquet")
    source = open_(tmp_path / "made")
    assert source.name == "made" and ids(read(source)) == ["r0", "r1", "r2", "r3", "r4", "r10", "r11", "r12"]
    assert ids(read(open_(tmp_path / "made", split="test"))) == ["r90"]
    assert [r.where for r in read(source, 4, 6)] == [
        "train-00000-of-00002.parquet, row 5",
        "train-00001-of-00002.parquet, row 1",
    ]
    assert json.loads(json.dumps(source.key())) == source.key() != open_(tmp_path / "made", split="test").key()
    with pytest.raises(ValueError, match="'dev'"):
        open_(tmp_path / "made", split="dev")


@settings(max_examples=30)
@given(st.lists(st.integers(1, 150), min_size=1, max_size=3), st.integers(1, 200), st.data())
def test_parquet_ranges_add_up(tmp_path_factory, parts, group, data):
    folder = tmp_path_factory.mktemp("x")
    for k, n in enumerate(parts):
        pq.write_table(questions(1000 * k, n), folder / f"{k}.parquet", row_group_size=group)
    source = ParquetSource(folder, OPTIONS)
    expected = [f"r{1000 * k + i}" for k, n in enumerate(parts) for i in range(n)]
    a, b = sorted(data.draw(st.tuples(*[st.integers(0, len(expected))] * 2)))
    assert ids(read(source, a, b)) == expected[a:b] and len(source) == len(expected)


def test_parquet_broken_utf8_loses_one_row(tmp_path):
    def column(*values: bytes) -> pa.Array:
        return pa.Array.from_buffers(pa.string(), len(values), pa.array(values, pa.binary()).buffers())

    table = pa.table(
        {
            "name": column(b"r0", b"r1", b"r\xff", b"r3"),
            "question": column(b"a", b"\xff\xfe", b"c", b"d"),
            "answer": column(b"a", b"b", b"c", b"d"),
        }
    )
    pq.write_table(table, tmp_path / "made.parquet")
    results = read(open_(tmp_path / "made.parquet", ItemOptions(rename=("name=id",))))
    assert ids(results) == ["r0", "r1:encoding", "made.parquet:3:encoding", "r3"]


def test_parquet_unreadable_row_group(tmp_path):
    path = tmp_path / "made.parquet"
    pq.write_table(questions(0, 300), path, row_group_size=100)
    raw = bytearray(path.read_bytes())
    column = pq.read_metadata(path).row_group(1).column(1)
    begin = column.dictionary_page_offset or column.data_page_offset
    raw[begin : begin + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(raw)
    results = read(open_(path))
    bad = [r for r in results if isinstance(r, Quarantined)]
    assert ids(results)[:100] == [f"r{i}" for i in range(100)] and ids(results)[200:] == [
        f"r{i}" for i in range(200, 300)
    ]
    assert len(bad) == 100 and {b.reason for b in bad} == {"syntax"} and bad[0].where == "made.parquet, row 101"
    assert read(open_(path), 150, 250) == results[150:250]


def test_parquet_chunks_read_row_group_once(tmp_path, monkeypatch):
    """Reading consecutive chunks decodes each row once, also with another worker's chunks between them."""
    decoded = []
    rows_of = parquet.rows_of

    def count(*args: Any) -> Any:
        for row in rows_of(*args):
            decoded.append(row)
            yield row

    monkeypatch.setattr(parquet, "rows_of", count)
    pq.write_table(questions(0, 1000), tmp_path / "made.parquet")
    source = ParquetSource(tmp_path / "made.parquet", OPTIONS)
    for step in (100, 200):
        decoded.clear()
        for start in range(0, 1000, step):
            assert ids(read(source, start, start + 100)) == [f"r{i}" for i in range(start, start + 100)]
        assert len(decoded) == 1100 - step
    # Backwards, and after a reader that stopped in the middle, it is read from the beginning again.
    assert ids(read(source, 50, 52)) == ["r50", "r51"]
    assert next(source.read(60, 70)).record.id == "r60"  # type: ignore[union-attr]
    assert ids(read(source, 61, 63)) == ["r61", "r62"] == ids(read(pickle.loads(pickle.dumps(source)), 61, 63))


def test_parquet_large_rows_decoded_in_small_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(row_groups, "BATCH_BYTES", 50_000)
    asked = []
    iter_batches = pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile, "iter_batches", lambda self, n, **k: asked.append(n) or iter_batches(self, n, **k)
    )
    for k, size in enumerate((10, 10_000, 200_000)):
        blobs = pa.array([bytes([i]) * size for i in range(20)], pa.binary())
        table = questions(0, 20).append_column("blob", blobs)
        pq.write_table(table, tmp_path / f"{k}.parquet", compression="none", use_dictionary=False)
    assert len(ids(read(ParquetSource(tmp_path, OPTIONS)))) == 60
    assert asked == [64, 4, 1]


@pytest.mark.parametrize("content", [b"", b"hello" * 99, None])
def test_parquet_rejects_damaged_file(tmp_path, content):
    path = tmp_path / "made.parquet"
    pq.write_table(questions(0, 9), path)
    path.write_bytes(path.read_bytes()[:-20] if content is None else content)
    with pytest.raises(ValueError, match=r"made\.parquet is not a parquet file"):
        open_(path)


def test_parquet_without_rows(tmp_path):
    pq.write_table(questions(0, 0), tmp_path / "made.parquet")
    with pytest.raises(ValueError, match="has no items"):
        open_(tmp_path / "made.parquet")


def test_parquet_values_that_python_cannot_hold(tmp_path):
    """Nanoseconds in a field without meaning cost no record; as an answer, they cost that record."""
    times = pa.array([1, 2_000_000_001], pa.timestamp("ns"))
    table = questions(0, 2).append_column("t", times).append_column("lists", pa.ListArray.from_arrays([0, 1, 2], times))
    pq.write_table(table, tmp_path / "made.parquet")
    results = read(open_(tmp_path / "made.parquet"))
    assert ids(results) == ["r0", "r1"]
    assert [(name, repr(value)) for name, value in results[0].unread] == [
        ("t", "TimestampType(timestamp[ns])"), ("lists", "ListType(list<element: timestamp[ns]>)"),
    ]  # fmt: skip
    pq.write_table(questions(0, 2).drop_columns(["answer"]).append_column("answer", times), tmp_path / "made.parquet")
    assert {one.reason for one in read(open_(tmp_path / "made.parquet"))} == {"fields"}


def test_parquet_bombs_cost_their_own_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(row_groups, "LIMIT", 64 * 2**20)
    once = pa.array(["", "y" * (12 * 2**20)])
    many = pa.DictionaryArray.from_arrays(pa.array([0, 1, 1, 0, 1, 1, 1, 1, 1], pa.int32()), once)
    pq.write_table(questions(0, 9).append_column("x", many), tmp_path / "a.parquet", store_schema=False)
    cells = pa.array([b"", bytes(150 * 2**20)])
    table = questions(9, 2).append_column("x", cells)
    with pq.ParquetWriter(tmp_path / "b.parquet", table.schema, compression="zstd", use_dictionary=False) as writer:
        writer.write_table(table.slice(0, 1))
        writer.write_table(table.slice(1))
    results = read(ParquetSource(tmp_path, OPTIONS))
    assert ids(results)[:-1] == [f"r{i}" for i in range(10)]
    assert results[-1].reason == "failed" and "limit on memory" in results[-1].detail


VALUE_BEYOND_THE_LIMIT = """
import pyarrow as pa
from phivision_jax.data.sources import row_groups
from phivision_jax.io.memory import limited_memory
row = pa.record_batch({"id": ["r0"], "x": [bytes(50 * 2**20)]})
with limited_memory(20 * 2**20):
    fields, error = row_groups._decode(row)
assert fields["id"] == "r0" and isinstance(error, MemoryError)
"""


def test_parquet_value_beyond_the_limit():
    """Arrow's scalar of it would abort the process. In a new one: where much was freed, there may be room for it."""
    subprocess.run([sys.executable, "-c", VALUE_BEYOND_THE_LIMIT], cwd=ROOT, check=True)
