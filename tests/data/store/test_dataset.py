"""The dataset directory: records are read as they were written, damage is located."""

from __future__ import annotations

import json
import threading

import msgpack
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from phivision_jax.data.quarantine import BadRecord
from phivision_jax.data.store import dataset as dataset_module
from phivision_jax.data.store.dataset import Dataset
from tests.support.datasets import write_dataset
from tests.support.records import make_record, mixed_records, png


@pytest.fixture
def written(tmp_path, processor):
    return write_dataset(tmp_path / "set", mixed_records(12), processor, shard_bytes=20_000)


def test_dataset_round_trip(written):
    assert len(written.manifest["shards"]) > 1
    assert [written[i] for i in range(len(written))] == mixed_records(12)
    assert [written[i].id for i in (7, 0, 11)] == ["r007", "r000", "r011"]
    with pytest.raises(IndexError, match="record 12"):
        written[12]


def test_dataset_keeps_metadata_and_thinking(tmp_path, processor):
    record = make_record(
        0,
        (),
        mode="think",
        task="math",
        metadata={"url": "https://example.org/é", "boxes": [[0.25, 0.5]], "n": 3},
        messages=({"role": "user", "content": "1+1"}, {"role": "assistant", "content": "<think>easy</think>2"}),
    )
    dataset = write_dataset(tmp_path / "set", [record], processor)
    assert dataset[0] == record
    assert (dataset.index.modes[0], dataset.index.tasks[0]) == (0, 1)


def test_index_counts_tokens_of_processor(written, processor):
    index = written.index
    assert index.num_images.tolist() == [0, 1, 1, 1, 2, 1] * 2
    assert index.image_sizes[:6].tolist() == [[24, 16], [64, 64], [16, 40], [24, 16], [32, 32], [8, 8]]
    assert index.image_offsets[:6].tolist() == [0, 0, 1, 2, 3, 5]
    for i in range(12):
        record = written[i]
        example = processor.encode(record.messages, record.images, mode="nothink")
        assert index.text_tokens[i] == len(example.tokens) - example.num_patches
    assert written.manifest["text_tokens"] == index.text_tokens.sum()


def test_dataset_hash_of_same_records(tmp_path, processor, written):
    again = write_dataset(tmp_path / "again", mixed_records(12), processor, shard_bytes=20_000)
    assert again.hash == written.hash
    other = write_dataset(tmp_path / "other", mixed_records(11), processor, shard_bytes=20_000)
    assert other.hash != written.hash


def test_import_of_memory_stores_image_bytes(tmp_path, processor):
    (tmp_path / "a.png").write_bytes(png(24, 16, seed=1))
    record = make_record(1, images=(str(tmp_path / "a.png"),))
    assert write_dataset(tmp_path / "set", [record], processor)[0].images == (png(24, 16, seed=1),)


@pytest.mark.parametrize(
    "record, message",
    [
        (make_record(3, images=()), "'r003'.*1 <image> markers.*0 images"),
        (make_record(3, images=(b"",)), "'r003'.*image 0.*0 bytes"),
        (make_record(3, images=("/nowhere/a.png",)), "'r003'.*nowhere"),
        (make_record(3, mode="think"), "'r003'.*mode is think"),
    ],
)
def test_import_of_memory_names_bad_record(tmp_path, processor, record, message):
    with pytest.raises(ValueError, match=message):
        write_dataset(tmp_path / "set", [record], processor)


def test_import_of_memory_without_records(tmp_path, processor):
    with pytest.raises(ValueError, match="no records"):
        write_dataset(tmp_path / "set", [], processor)


def test_dataset_open_errors(tmp_path, written):
    with pytest.raises(FileNotFoundError, match="no dataset in"):
        Dataset.open(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no manifest\.json"):
        Dataset.open(tmp_path / "empty")

    shard = written.directory / "records-00000-001.array_record"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"records-00000-001.*cut-off"):
        Dataset.open(written.directory)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"records-00000-001.*is missing"):
        Dataset.open(written.directory)
    shard.write_bytes(content)
    assert Dataset.open(written.directory).hash == written.hash

    path = written.directory / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 99}))
    with pytest.raises(ValueError, match="schema 99, this program reads 4"):
        Dataset.open(written.directory)


def test_index_is_memory_mapped(written):
    index = Dataset.open(written.directory).index
    assert index.text_tokens.dtype == np.int32 and index.modes.dtype == np.int8
    assert index.sizes_of(4) == [(24, 16), (32, 32)] and index.sizes_of(11) == [(8, 8)] and index.sizes_of(6) == []
    # Sixty million offsets in every process of a machine would be gigabytes.
    assert {type(column) for name, column in vars(index).items() if name != "task_names"} == {np.memmap}


def test_dataset_open_checks_files_concurrently(written, monkeypatch):
    """On network storage each file takes milliseconds, and there may be thousands."""
    assert len(written.manifest["shards"]) + 5 >= 8
    barrier, checked = threading.Barrier(8), []

    def check(directory, file):
        checked.append(file["file"])
        if len(checked) <= 8:
            barrier.wait(timeout=30)

    monkeypatch.setattr(dataset_module, "check_size", check)
    Dataset.open(written.directory)
    assert len(checked) == len(written.manifest["shards"]) + 5


class TestUnreadable:
    """Intact records of a damaged file are read; the others are errors that name file and record."""

    def bad(self, dataset: Dataset) -> dict[int, str]:
        found = {}
        for i in range(len(dataset)):
            try:
                assert dataset[i] == mixed_records(12)[i]
            except BadRecord as error:
                assert error.reason == "unreadable"
                assert "cannot be read: " in str(error) and "see phivision data validate" in str(error)
                found[i] = str(error)
        return found

    def numbers(self, dataset: Dataset, k: int) -> list[int]:
        counts = [s["records"] for s in dataset.manifest["shards"]]
        return list(range(sum(counts[:k]), sum(counts[: k + 1])))

    def test_flipped_bit(self, written):
        shard = written.directory / written.manifest["shards"][1]["file"]
        content = bytearray(shard.read_bytes())
        content[content.index(b"IDAT") + 100] ^= 1
        shard.write_bytes(content)
        first, *others = self.numbers(written, 1)
        found = self.bad(Dataset.open(written.directory))
        assert others and list(found) == [first]
        assert f"record 0 of {shard} cannot be read" in found[first]

    def test_noise_and_cut_off_file(self, written):
        for k, damage in enumerate((lambda c: bytes(reversed(c)), lambda c: c[:1000], lambda c: b"")):
            shard = written.directory / written.manifest["shards"][k]["file"]
            content = shard.read_bytes()
            dataset = Dataset.open(written.directory)  # before the damage
            shard.write_bytes(damage(content))
            assert list(self.bad(dataset)) == self.numbers(written, k)
            shard.write_bytes(content)
            assert self.bad(dataset) == {}

    def test_payload_is_no_record(self, written):
        shard = written.directory / written.manifest["shards"][0]["file"]
        numbers = self.numbers(written, 0)
        for payload in (b"", b"\xc1", msgpack.packb({"id": "a"}), msgpack.packb([1])):
            writer = ArrayRecordWriter(str(shard), "group_size:1")
            for _ in numbers:
                writer.write(payload)
            writer.close()
            manifest = json.loads((written.directory / "manifest.json").read_text())
            manifest["shards"][0]["bytes"] = shard.stat().st_size
            (written.directory / "manifest.json").write_text(json.dumps(manifest))
            assert list(self.bad(Dataset.open(written.directory))) == numbers

    def test_wrong_number_of_records(self, written):
        names = [written.directory / s["file"] for s in written.manifest["shards"]]
        dataset = Dataset.open(written.directory)
        counts = [s["records"] for s in written.manifest["shards"]]
        other = next(k for k, n in enumerate(counts) if n != counts[0])
        names[0].write_bytes(names[other].read_bytes())
        found = self.bad(dataset)
        assert list(found) == self.numbers(written, 0)
        assert f"it has {counts[other]} records, the manifest {counts[0]}" in found[0]

    def test_missing_file_is_os_error(self, written):
        dataset = Dataset.open(written.directory)
        shard = written.directory / written.manifest["shards"][0]["file"]
        away = shard.rename(shard.with_suffix(".away"))
        with pytest.raises(FileNotFoundError, match="records-00000-000"):
            dataset[0]
        shard.mkdir()
        with pytest.raises(IsADirectoryError):
            dataset[0]
        shard.rmdir()
        away.rename(shard)
        assert dataset[0].id == "r000"  # opened again
