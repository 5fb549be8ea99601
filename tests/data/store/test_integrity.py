"""Validation: an intact dataset has no problem, and each kind of damage is located."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from phivision_jax.data.store.dataset import MANIFEST, Dataset, describe_file
from phivision_jax.data.store.integrity import Report, validate
from tests.support.datasets import write_dataset
from tests.support.records import make_record, mixed_records, png


@pytest.fixture(scope="module")
def sound(tmp_path_factory, processor) -> Path:
    records = [*mixed_records(12), make_record(5), make_record(7, ())]  # the last two have ids of earlier ones
    out = tmp_path_factory.mktemp("sound") / "set"
    return write_dataset(out, records, processor, shard_bytes=20_000).directory


@pytest.fixture
def copy(sound, tmp_path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "set"))


def found(directory: Path, **options) -> Report:
    return validate(directory, workers=options.pop("workers", 0), progress=False, **options)


def rewrite_manifest(directory: Path) -> None:
    """Accept the index as it is now."""
    manifest = json.loads((directory / MANIFEST).read_text())
    manifest["index"] = [describe_file(directory, f["file"]) for f in manifest["index"]]
    (directory / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("workers", [0, 2])
def test_validate_intact_dataset(sound, workers):
    shards = len(Dataset.open(sound).manifest["shards"])
    assert shards > 2
    assert found(sound, workers=workers) == Report(
        files=shards + 5, records=14, images=13, problems=[], duplicates=2, duplicate_ids=["r005", "r007"]
    )
    assert found(sound, decode=False).problems == []


def test_validate_locates_flipped_bit(copy):
    names = [s["file"] for s in Dataset.open(copy).manifest["shards"]]
    content = bytearray((copy / names[1]).read_bytes())
    content[content.index(b"IDAT") + 100] ^= 1  # in the pixels of a record
    (copy / names[1]).write_bytes(content)
    problems = found(copy).problems
    assert next((p.where, p.reason) for p in problems if not p.id) == (names[1], "file")
    assert any(p.where.startswith(f"{names[1]}, record ") and p.reason == "unreadable" for p in problems)
    assert {p.where.partition(",")[0] for p in problems} == {names[1]}


def test_validate_finds_noise(copy):
    name = Dataset.open(copy).manifest["shards"][0]["file"]
    noise = np.random.default_rng(0).integers(0, 256, (copy / name).stat().st_size, np.uint8)
    (copy / name).write_bytes(noise.tobytes())
    problems = found(copy).problems
    assert [p.reason for p in problems] == ["file"] and "sha256" in problems[0].detail


def test_validate_compares_records_with_index(copy):
    modes = np.load(copy / "index" / "modes.npy")
    modes[3] = 0
    np.save(copy / "index" / "modes.npy", modes)
    (problem,) = found(copy).problems
    assert (problem.where, problem.reason) == ("index/modes.npy", "file")
    rewrite_manifest(copy)
    (problem,) = found(copy).problems
    assert (problem.id, problem.reason) == ("r003", "index")
    assert problem.detail == "mode: nothink, but think in the index"
    modes[3] = 1
    np.save(copy / "index" / "modes.npy", modes)

    sizes = np.load(copy / "index" / "image_sizes.npy")
    sizes[0] = 1, 2
    np.save(copy / "index" / "image_sizes.npy", sizes)
    rewrite_manifest(copy)
    (problem,) = found(copy, decode=False).problems
    assert (problem.id, problem.detail) == ("r001", "image sizes: [(24, 16)], but [(1, 2)] in the index")


def test_validate_checks_index_lengths(copy):
    np.save(copy / "index" / "modes.npy", np.zeros(15, np.int8))
    rewrite_manifest(copy)
    (problem,) = found(copy).problems
    assert (problem.where, problem.reason) == ("index", "index")


def test_validate_decodes_images(tmp_path, processor):
    records = [make_record(0), make_record(1, images=(png(24, 16)[:-100],)), make_record(2)]
    write_dataset(tmp_path / "set", records, processor)
    (problem,) = found(tmp_path / "set").problems
    assert (problem.id, problem.reason) == ("r001", "image-broken")
    assert problem.where == "records-00000-000.array_record, record 1 of the dataset"
    assert json.loads(problem.to_line())["id"] == "r001"
    assert found(tmp_path / "set", decode=False).problems == []


@pytest.mark.parametrize("workers", [0, 2])
def test_validate_finds_missing_and_cut_off_shards(copy, workers):
    shards = Dataset.open(copy).manifest["shards"]
    first, last = shards[0]["file"], shards[-1]["file"]
    (copy / first).write_bytes((copy / first).read_bytes()[:-1])
    (copy / last).unlink()
    report = found(copy, workers=workers)
    assert [(p.where, p.reason) for p in report.problems] == [(first, "file"), (last, "file")]
    assert "cut-off copy" in report.problems[0].detail and "is missing" in report.problems[1].detail
    # The intact shards were checked.
    assert report.records == 14 and 0 < report.images < 13
    assert set(report.duplicate_ids) <= {"r005", "r007"}
    shutil.copy(copy / shards[1]["file"], copy / last)  # and a file in the place of another
    assert [p.where for p in found(copy, workers=workers).problems][:2] == [first, last]


def test_validate_finds_missing_and_cut_off_index(copy):
    modes, tasks = copy / "index" / "modes.npy", copy / "index" / "tasks.npy"
    modes.unlink()
    tasks.write_bytes(tasks.read_bytes()[:-1])
    problems = found(copy).problems
    assert [(p.where, p.reason) for p in problems] == [("index/modes.npy", "file"), ("index/tasks.npy", "file")]


def test_validate_checks_image_offsets(copy):
    path = copy / "index" / "image_offsets.npy"
    offsets = np.load(path)
    for where, value in ((slice(0, 2), 1), (-1, 12), (3, 9)):
        wrong = offsets.copy()
        wrong[where] = value
        np.save(path, wrong)
        rewrite_manifest(copy)
        (problem,) = found(copy).problems
        assert (problem.where, problem.reason) == ("index", "index")


def test_validate_without_dataset(tmp_path, copy):
    with pytest.raises(FileNotFoundError, match="no dataset in"):
        found(tmp_path / "absent")
    (copy / MANIFEST).write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        found(copy)
