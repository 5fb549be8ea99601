"""Readers of damaged files: records, lines of the quarantine, or one sentence that names the file; no traceback."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable
from pathlib import Path

import msgpack
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from phivision_jax.data.sources.item_options import ItemOptions
from phivision_jax.data.sources.open_source import open_source
from phivision_jax.data.sources.source import Read
from tests.support.mutations import damage_bytes

ITEMS = [
    {
        "id": f"r{k}",
        "conversations": [{"from": "human", "value": "wäs?"}, {"from": "gpt", "value": "that"}],
        "n": [k, 0.5],
    }
    for k in range(4)
]
MUTATIONS = 2_000


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


def check_reading(path: Path, most: int = 100) -> int:
    """Read a source's first items; their number."""
    try:
        source = open_source(path, options=ItemOptions())
        results = list(source.read(0, min(most, len(source))))
    except ValueError as error:
        assert path.name in str(error) and len(str(error)) < 700, error
        return 0
    assert len(results) == min(most, len(source))
    for one in results:
        assert isinstance(one, Read) or (one.where.startswith((path.name, source.name)) and one.detail)
        assert isinstance(one, Read) or len(one.detail) < 700
    return len(results)


@pytest.mark.parametrize("make", [lines, array, parquet])
def test_damaged_file_is_read_or_named(make: Callable[[], bytes], tmp_path: Path) -> None:
    content, rng = make(), random.Random(7)
    path = tmp_path / f"made.{ {lines: 'jsonl', array: 'json', parquet: 'parquet'}[make] }"
    read = 0
    for _ in range(MUTATIONS):
        path.write_bytes(damage_bytes(content, rng))
        read += check_reading(path)
    assert read > 100, "most mutations would not reach the items"


@pytest.mark.slow
def test_damaged_payloads_are_read_or_named(tmp_path: Path) -> None:
    content, rng = payloads(tmp_path), random.Random(7)
    for _ in range(MUTATIONS):
        (tmp_path / "made.array_record").write_bytes(damage_bytes(content, rng))
        check_reading(tmp_path / "made.array_record")


VALUES = [b"null", b"-1", b'"-1"', b"[]", b"{}", b'""', b'"../x"', b'"{X}"', b'"\\u0000"', b"1e999", b'["1", "1"]']
VALUES += [b'"%d"' % 10**n for n in (5, 6, 13, 20)] + [b'"tensorflow_datasets.core.features.text_feature.Text"']


def change_value(content: bytes, rng: random.Random) -> bytes:
    """Valid JSON still, with another name or value in one place."""
    place = rng.choice([*re.finditer(rb'"[^"]*"', content)])
    return content[: place.start()] + rng.choice(VALUES) + content[place.end() :]


@pytest.mark.parametrize("count", [300, pytest.param(MUTATIONS, marks=pytest.mark.slow)])
def test_damaged_metadata_of_tfds_is_named(count: int, tmp_path: Path) -> None:
    """No mutation hangs, or states a number of examples that takes long to read."""
    module = pytest.importorskip("tests.data.sources.test_tfds")
    builder = module.Made(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    rng, read, begin = random.Random(7), 0, time.process_time()
    for name in ("dataset_info.json", "features.json"):
        content = (builder.data_path / name).read_bytes()
        for k in range(count // 2):
            (builder.data_path / name).write_bytes((damage_bytes if k % 2 else change_value)(content, rng))
            read += check_reading(Path(builder.data_path), most=5) > 0
        (builder.data_path / name).write_bytes(content)
    assert read > count / 20 and time.process_time() - begin < 30
