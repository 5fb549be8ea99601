"""The directory of a dataset: what is written is read, and what is damaged is named."""

from __future__ import annotations

import json

import numpy as np
import pytest
from made_up import make_record, mixed_records, png

from phivision_jax.data import importing
from phivision_jax.data.dataset import Dataset
from phivision_jax.data.importing import write_dataset


@pytest.fixture
def written(tmp_path, processor):
    return write_dataset(tmp_path / "set", mixed_records(12), processor, shard_bytes=20_000, progress=False)


def test_round_trip_over_several_shards(written):
    assert len(written.manifest["shards"]) > 1
    assert [written[i] for i in range(len(written))] == mixed_records(12)
    assert [written[i].id for i in (7, 0, 11)] == ["r007", "r000", "r011"]
    with pytest.raises(IndexError, match="record 12"):
        written[12]


def test_metadata_and_thinking_survive(tmp_path, processor):
    record = make_record(
        0,
        (),
        mode="think",
        task="math",
        metadata={"url": "https://example.org/é", "boxes": [[0.25, 0.5]], "n": 3},
        messages=({"role": "user", "content": "1+1"}, {"role": "assistant", "content": "<think>easy</think>2"}),
    )
    dataset = write_dataset(tmp_path / "set", [record], processor, progress=False)
    assert dataset[0] == record
    assert (dataset.index.modes[0], dataset.index.tasks[0]) == (0, 1)


def test_the_index_counts_what_the_processor_makes(written, processor):
    index = written.index
    assert index.num_images.tolist() == [0, 1, 1, 1, 2, 1] * 2
    assert index.image_sizes[:6].tolist() == [[24, 16], [64, 64], [16, 40], [24, 16], [32, 32], [8, 8]]
    assert index.image_offsets[:6].tolist() == [0, 0, 1, 2, 3, 5]
    for i in range(12):
        record = written[i]
        example = processor.encode(record.messages, record.images, mode="nothink")
        assert index.text_tokens[i] == len(example.tokens) - example.num_patches
    assert written.manifest["text_tokens"] == index.text_tokens.sum()


def test_same_records_same_bytes(tmp_path, processor, written):
    again = write_dataset(tmp_path / "again", mixed_records(12), processor, shard_bytes=20_000, progress=False)
    assert again.hash == written.hash
    other = write_dataset(tmp_path / "other", mixed_records(11), processor, shard_bytes=20_000, progress=False)
    assert other.hash != written.hash


def test_paths_are_stored_as_bytes(tmp_path, processor):
    (tmp_path / "a.png").write_bytes(png(24, 16, seed=1))
    record = make_record(1, images=(str(tmp_path / "a.png"),))
    assert write_dataset(tmp_path / "set", [record], processor, progress=False)[0].images == (png(24, 16, seed=1),)


def test_nothing_half_written_has_the_name(tmp_path, processor, monkeypatch):
    def killed(*args):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(importing, "_finish", killed)
        write_dataset(tmp_path / "set", [make_record(0)], processor, progress=False)
    assert list(tmp_path.iterdir()) == []
    # What a killed import left behind is not in the way.
    (tmp_path / ".set.partial").mkdir()
    (tmp_path / ".set.partial" / "records-00009.array_record").write_bytes(b"rest")
    dataset = write_dataset(tmp_path / "set", [make_record(0)], processor, progress=False)
    assert len(dataset.manifest["shards"]) == 1 and [p.name for p in tmp_path.iterdir()] == ["set"]
    with pytest.raises(FileExistsError, match="remove it"):
        write_dataset(tmp_path / "set", [make_record(0)], processor, progress=False)


@pytest.mark.parametrize(
    "record, message",
    [
        (make_record(3, images=()), "'r003'.*1 <image> markers.*0 images"),
        (make_record(3, images=(b"",)), "'r003'.*image 0.*0 bytes"),
        (make_record(3, images=("/nowhere/a.png",)), "'r003'.*nowhere"),
        (make_record(3, mode="think"), "'r003'.*mode is think"),
    ],
)
def test_a_record_that_cannot_be_measured_is_named(tmp_path, processor, record, message):
    with pytest.raises(ValueError, match=message):
        write_dataset(tmp_path / "set", [record], processor, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_no_records(tmp_path, processor):
    with pytest.raises(ValueError, match="no records"):
        write_dataset(tmp_path / "set", [], processor, progress=False)


def test_open_says_what_is_wrong(tmp_path, written):
    with pytest.raises(FileNotFoundError, match="no dataset directory"):
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
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # one flipped bit: size is right
    with pytest.raises(ValueError, match=r"records-00000-001.*sha256"):
        Dataset.open(written.directory).verify()
    shard.write_bytes(content)
    Dataset.open(written.directory).verify()

    path = written.directory / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 99}))
    with pytest.raises(ValueError, match="schema 99, this program reads 2"):
        Dataset.open(written.directory)


def test_the_index_is_compact(written):
    assert written.index.text_tokens.dtype == np.int32 and written.index.modes.dtype == np.int8
