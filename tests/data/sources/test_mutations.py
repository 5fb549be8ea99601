"""Readers of damaged files: records, lines of the quarantine, or one sentence that names the file; no traceback."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import msgpack
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from phivision_jax.data.quarantine import Quarantined
from phivision_jax.data.sources.item_options import ItemOptions
from phivision_jax.data.sources.open_source import open_source
from phivision_jax.data.sources.source import Read

ITEMS = [
    {
        "id": f"r{k}",
        "conversations": [{"from": "human", "value": "wäs?"}, {"from": "gpt", "value": "that"}],
        "n": [k, 0.5],
    }
    for k in range(4)
]
MUTATIONS = 2_000


def mutate(content: bytes, rng: random.Random) -> bytes:
    """One to four changes: bytes set, removed, repeated or inserted; numbers made huge; the end cut off."""
    damaged = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        place, length = rng.randrange(len(damaged) + 1), rng.choice((1, 1, 2, 4, 8, 40))
        new = rng.choice(
            (rng.randbytes(length), b"\xff" * length, bytes(length), b"[" * 40, b'"', b"9" * 30, b"{}", b"")
        )
        damaged[place : place + rng.choice((0, len(new), length))] = new
    return bytes(damaged if rng.random() < 0.9 else damaged[: rng.randrange(len(damaged) + 1)])


def lines() -> bytes:
    return b"".join(json.dumps(item).encode() + b"\n" for item in ITEMS)


def array() -> bytes:
    return json.dumps(ITEMS, ensure_ascii=False).encode()


def parquet() -> bytes:
    file = pa.BufferOutputStream()
    rows = [{"id": item["id"], "question": "what?", "answer": "that", "list": item["n"]} for item in ITEMS]
    pq.write_table(pa.Table.from_pylist(rows), file, compression="zstd", row_group_size=2)
    return file.getvalue().to_pybytes()


def payloads(folder: Path) -> bytes:
    writer = ArrayRecordWriter(str(folder / "x"), "group_size:1,uncompressed")
    for k, item in enumerate(ITEMS):
        writer.write(msgpack.packb(item) if k % 2 else json.dumps(item).encode())
    writer.close()
    return (folder / "x").read_bytes()


def check_reading(path: Path) -> int:
    """Read a source; the number of its results."""
    try:
        source = open_source(path, options=ItemOptions())
        results = list(source.read(0, len(source)))
    except ValueError as error:
        assert path.name in str(error) and len(str(error)) < 700, error
        return 0
    assert len(results) == len(source)
    for one in results:
        assert isinstance(one, Read) or (isinstance(one, Quarantined) and path.name in one.where and one.detail)
        assert isinstance(one, Read) or len(one.detail) < 700
    return len(results)


@pytest.mark.parametrize("make", [lines, array, parquet])
def test_damaged_file_is_read_or_named(make: Callable[[], bytes], tmp_path: Path) -> None:
    content, rng = make(), random.Random(7)
    path = tmp_path / f"made.{ {lines: 'jsonl', array: 'json', parquet: 'parquet'}[make] }"
    read = 0
    for _ in range(MUTATIONS):
        path.write_bytes(mutate(content, rng))
        read += check_reading(path)
    assert read > 100, "most mutations would not reach the items"


@pytest.mark.slow
def test_damaged_payloads_are_read_or_named(tmp_path: Path) -> None:
    content, rng = payloads(tmp_path), random.Random(7)
    for _ in range(MUTATIONS):
        (tmp_path / "made.array_record").write_bytes(mutate(content, rng))
        check_reading(tmp_path / "made.array_record")
