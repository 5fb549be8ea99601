from __future__ import annotations

import gzip
import json
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from phivision_jax.data.quarantine import Quarantined
from phivision_jax.data.sources.easy_vqa import easy_vqa
from phivision_jax.data.sources.files import files_of_split, shorten
from phivision_jax.data.sources.item_options import ItemOptions
from phivision_jax.data.sources.json_files import JsonSource
from phivision_jax.data.sources.open_source import open_source
from phivision_jax.data.sources.parquet import ParquetSource
from phivision_jax.data.sources.source import Read, RecordsSource
from tests.support.records import make_record, mixed_records

OPTIONS = ItemOptions()
ITEM = {"question": "what?", "answer": "that"}


def write_parquet(path) -> None:
    pq.write_table(pa.table({k: [v] for k, v in ITEM.items()}), path)


@pytest.mark.parametrize("name", ["a.json", "a.JSONL", "a.ndjson", "a.txt", "a.parquet", "a.pq", "a"])
def test_open_source_by_extension(tmp_path, name):
    path = tmp_path / name
    if name in ("a.parquet", "a.pq"):
        write_parquet(path)
        assert isinstance(open_source(path, options=OPTIONS), ParquetSource)
        return
    path.write_text(json.dumps(ITEM))
    if name in ("a.txt", "a"):
        with pytest.raises(ValueError, match=r"is not clear from its name: looked for \.json"):
            open_source(path, options=OPTIONS)
    assert isinstance(open_source(path, options=OPTIONS, format="json"), JsonSource)


def test_open_source_by_folder(tmp_path):
    with pytest.raises(ValueError, match=r"nothing that can be read: looked for \.json"):
        open_source(tmp_path, options=OPTIONS)
    (tmp_path / "state.json").write_text("{}")
    (tmp_path / "images").mkdir()
    (tmp_path / "data").mkdir()
    write_parquet(tmp_path / "data" / "x.parquet")
    assert isinstance(open_source(tmp_path, options=OPTIONS), ParquetSource)
    (tmp_path / "more.json").write_text(json.dumps([ITEM]))
    with pytest.raises(ValueError, match=r"more than one format \(json, parquet\)"):
        open_source(tmp_path, options=OPTIONS)
    assert isinstance(open_source(tmp_path, options=OPTIONS, format="parquet"), ParquetSource)
    assert isinstance(open_source(tmp_path, options=OPTIONS, format="json"), JsonSource)


def test_files_of_split(tmp_path):
    def names(split: str = "train") -> tuple[str, str]:
        read, left_out = files_of_split(tmp_path, "json", split)
        assert sorted(read + left_out) == sorted(tmp_path.iterdir())
        return shorten(read), shorten(left_out)

    def add(*names: str) -> None:
        for name in names:
            (tmp_path / name).write_text(json.dumps(ITEM))

    add("test.jsonl")
    with pytest.raises(ValueError, match=r"no json file of split 'train', only test\.jsonl"):
        open_source(tmp_path, options=OPTIONS)
    add("part-0.jsonl", "testimony.jsonl")
    assert names() == ("part-0.jsonl, testimony.jsonl", "test.jsonl"), "files without a split are train"
    assert names("test") == ("test.jsonl", "part-0.jsonl, testimony.jsonl") and names("part")[0] == "part-0.jsonl"
    add("train.jsonl", "shapes_test.json", "shapes-Validation.json", "x_val.json")
    assert names() == (
        "part-0.jsonl, testimony.jsonl, train.jsonl",
        "shapes-Validation.json, shapes_test.json, test.jsonl, x_val.json",
    )
    assert (
        names("test")[0] == "shapes_test.json, test.jsonl" and names("val")[0] == "shapes-Validation.json, x_val.json"
    )
    source = open_source(tmp_path, options=OPTIONS)
    assert (
        isinstance(source, JsonSource)
        and len(source) == 3
        and source.files == files_of_split(tmp_path, "json", "train")
    )


def test_open_source_subfolders(tmp_path):
    for folder in (".cache", "config", "empty"):
        (tmp_path / folder).mkdir()
    for folder in (".cache", "config"):
        write_parquet(tmp_path / folder / "train-0.parquet")
    assert len(open_source(tmp_path, options=OPTIONS)) == 1
    write_parquet(tmp_path / "empty" / "train-0.parquet")
    with pytest.raises(ValueError, match=r"parquet files in 2 subfolders \(config, empty\): give one of them"):
        open_source(tmp_path, options=OPTIONS)
    write_parquet(tmp_path / "train-0.parquet")
    assert len(open_source(tmp_path, options=OPTIONS)) == 1, "the folder itself comes first"


def test_open_source_compressed(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"{}"))
    for path in (tmp_path, tmp_path / "a.jsonl.gz"):
        with pytest.raises(ValueError, match=r"a\.jsonl\.gz is compressed: unpack it first"):
            open_source(path, options=OPTIONS)


def test_open_source_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        open_source(tmp_path / "x.json", options=OPTIONS)
    with pytest.raises(ValueError, match="read as tfds, not as json"):
        open_source("tfds:x", options=OPTIONS, format="json")
    with pytest.raises(ValueError, match="format must be one of"):
        open_source(tmp_path, options=OPTIONS, format="csv")  # type: ignore[arg-type]


def test_records_source(tmp_path):
    (tmp_path / "1.png").write_bytes(mixed_records(2)[1].images[0])  # type: ignore[arg-type]
    by_path = make_record(1, images=(str(tmp_path / "1.png"),))
    odd = make_record(9, (), messages=({"content": None},))  # left to the check of records
    records = [*mixed_records(6), by_path, make_record(7, images=("gone.png",)), make_record(8, mode=None), odd]
    source = pickle.loads(pickle.dumps(RecordsSource(records, "mine")))
    results = list(source.read(0, 10))
    assert [r.record for r in results[:6]] == records[:6]  # type: ignore[union-attr]
    assert isinstance(results[6], Read) and results[6].record == make_record(1)
    assert isinstance(results[7], Quarantined) and (results[7].id, results[7].reason) == ("r007", "image-missing")
    assert isinstance(results[8], Read) and (results[8].record.mode, results[8].mode_from) == (None, "inferred")
    assert isinstance(results[9], Read) and results[9].record == odd
    assert list(source.read(2, 4)) == results[2:4] and results[0].where == "record 1 of mine"
    assert json.loads(json.dumps(source.key())) == source.key() == RecordsSource(records, "mine").key()
    assert RecordsSource(records[1:], "mine").key() != source.key()


def test_records_source_of_easy_vqa():
    records = easy_vqa("test", max_images=3)
    assert [r.record for r in RecordsSource(records).read(0, len(records))] == records  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("files", "what", "remedy"),
    [
        (["a.csv"], r"a\.csv is a table", "to_json"),
        (["a.XLSX"], r"a\.XLSX is a table", "to_json"),
        (["data-00000-of-00001.arrow", "dataset_info.json", "state.json"], "datasets.save_to_disk", "to_parquet"),
        (
            ["dataset_dict.json", "train/data.arrow", "train/dataset_info.json"],
            "datasets.save_to_disk",
            "to_parquet",
        ),
        (["shard-000.tar"], r"shard-000\.tar is an archive", "unpack it"),
        (["a.tar.gz"], r"a\.tar\.gz is compressed", "unpack it"),
        (["x.tfrecord-00000-of-00001"], "is a file of TensorFlow", "TFDS"),
    ],
)
def test_open_source_recognises_other_formats(tmp_path, files, what, remedy):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"{}")
    for path in (tmp_path, tmp_path / files[0]) if len(files) == 1 else (tmp_path,):
        with pytest.raises(ValueError, match=what) as error:
            open_source(path, options=ItemOptions())
        assert remedy in str(error.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.array_record"])
@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", r"Git LFS.*run git lfs pull"),
        (b"\n<!DOCTYPE html>\n<html><body>404</body></html>", "HTML page.*download the file again"),
    ],
)
def test_open_source_recognises_files_that_another_has_replaced(tmp_path, name, content, what):
    (tmp_path / name).write_bytes(content)
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(ValueError, match=f"{name} is .*{what}"):
            open_source(path, options=ItemOptions())
