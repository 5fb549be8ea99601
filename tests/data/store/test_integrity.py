"""Validation: a sound dataset has no problem, and each kind of damage is named where it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from phivision_jax.data.store.dataset import MANIFEST, Dataset, describe_file
from phivision_jax.data.store.importing import write_dataset
from phivision_jax.data.store.integrity import Report, validate
from phivision_jax.processor import Processor
from phivision_jax.text.template import ChatTemplate
from tests.support.records import CONFIG, make_record, mixed_records, png


@pytest.fixture(scope="module")
def sound(tmp_path_factory, processor) -> Path:
    records = [*mixed_records(12), make_record(5), make_record(7, ())]  # the last two called like earlier ones
    out = tmp_path_factory.mktemp("sound") / "set"
    return write_dataset(out, records, processor, shard_bytes=20_000, progress=False).directory


@pytest.fixture
def copy(sound, tmp_path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "set"))


def found(directory: Path, processor: Processor | None, **options) -> Report:
    return validate(directory, processor, workers=options.pop("workers", 0), progress=False, **options)


def damage(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def rewrite_manifest(directory: Path, index: str) -> None:
    """As a program would that wrote another index."""
    manifest = json.loads((directory / MANIFEST).read_text())
    manifest["index"] = [describe_file(directory, f["file"]) for f in manifest["index"]]
    (directory / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sound_dataset(sound, processor, workers):
    shards = len(Dataset.open(sound).manifest["shards"])
    assert shards > 2
    assert found(sound, processor, workers=workers) == Report(
        files=shards + 5, records=14, images=13, problems=[], duplicates=2, duplicate_ids=["r005", "r007"]
    )
    assert found(sound, None, decode=False).problems == []


def test_a_flipped_bit_names_file_and_record(copy, processor):
    names = [s["file"] for s in Dataset.open(copy).manifest["shards"]]
    content = (copy / names[1]).read_bytes()
    # In the pixels of a record, which are stored as they are.
    needle = b"IDAT"
    damage(copy / names[1], content.index(needle) + 100)
    problems = found(copy, processor).problems
    assert next((p.where, p.reason) for p in problems if not p.id) == (names[1], "file")
    assert any(p.where.startswith(f"{names[1]}, record ") and p.reason == "unreadable" for p in problems)
    assert {p.where.partition(",")[0] for p in problems} == {names[1]}


def test_a_file_of_nothing_but_noise(copy, processor):
    name = Dataset.open(copy).manifest["shards"][0]["file"]
    noise = np.random.default_rng(0).integers(0, 256, (copy / name).stat().st_size, np.uint8)
    (copy / name).write_bytes(noise.tobytes())
    problems = found(copy, processor).problems
    assert [p.reason for p in problems] == ["file", "file"] and "cannot be read" in problems[1].detail


def test_another_index(copy, processor):
    index = np.load(copy / "index" / "text_tokens.npy")
    index[3] += 1
    np.save(copy / "index" / "text_tokens.npy", index)
    (problem,) = found(copy, processor).problems
    assert (problem.where, problem.reason) == ("index/text_tokens.npy", "file")
    rewrite_manifest(copy, "text_tokens")
    (problem,) = found(copy, processor).problems
    assert (problem.id, problem.reason) == ("r003", "index")
    assert problem.detail == f"text tokens: {index[3] - 1}, the index says {index[3]}"
    assert found(copy, None).problems == []  # without a processor texts are left alone

    sizes = np.load(copy / "index" / "image_sizes.npy")
    sizes[0] = 1, 2
    np.save(copy / "index" / "image_sizes.npy", sizes)
    rewrite_manifest(copy, "image_sizes")
    (problem,) = found(copy, None).problems
    assert (problem.id, problem.detail) == ("r001", "image sizes: [(24, 16)], the index says [(1, 2)]")


def test_an_index_of_another_length(copy, processor):
    np.save(copy / "index" / "modes.npy", np.zeros(15, np.int8))
    rewrite_manifest(copy, "modes")
    (problem,) = found(copy, processor).problems
    assert (problem.where, problem.reason) == ("index", "index")


def test_pixels_that_no_import_looked_at(tmp_path, processor):
    records = [make_record(0), make_record(1, images=(png(24, 16)[:-100],)), make_record(2)]
    write_dataset(tmp_path / "set", records, processor, progress=False)
    (problem,) = found(tmp_path / "set", processor).problems
    assert (problem.id, problem.reason) == ("r001", "image-broken")
    assert problem.where == "records-00000-000.array_record, record 1 of the dataset"
    assert json.loads(problem.to_json())["id"] == "r001"
    assert found(tmp_path / "set", processor, decode=False).problems == []


def test_another_tokenizer_or_template(sound, processor):
    other = Processor(processor.tokenizer, ChatTemplate(processor.template.source + "\n"), CONFIG)
    with pytest.raises(ValueError, match="another tokenizer or chat template"):
        found(sound, other)


@pytest.mark.parametrize("workers", [0, 2])
def test_files_that_are_missing_or_cut_off_are_problems_too(copy, processor, workers):
    shards = Dataset.open(copy).manifest["shards"]
    first, last = shards[0]["file"], shards[-1]["file"]
    (copy / first).write_bytes((copy / first).read_bytes()[:-1])
    (copy / last).unlink()
    report = found(copy, processor, workers=workers)
    assert [(p.where, p.reason) for p in report.problems] == [(first, "file"), (last, "file")]
    assert "cut-off copy" in report.problems[0].detail and "is missing" in report.problems[1].detail
    # What is whole was looked at, and is not confused with what is not.
    assert report.records == 14 and 0 < report.images < 13
    assert set(report.duplicate_ids) <= {"r005", "r007"}
    shutil.copy(copy / shards[1]["file"], copy / last)  # and a file in the place of another
    assert [p.where for p in found(copy, processor, workers=workers).problems][:2] == [first, last]


def test_an_index_that_is_missing_or_cut_off(copy, processor):
    modes, tasks = copy / "index" / "modes.npy", copy / "index" / "tasks.npy"
    modes.unlink()
    tasks.write_bytes(tasks.read_bytes()[:-1])
    problems = found(copy, processor).problems
    assert [(p.where, p.reason) for p in problems] == [("index/modes.npy", "file"), ("index/tasks.npy", "file")]


def test_images_that_the_index_gives_to_no_record_or_to_two(copy, processor):
    path = copy / "index" / "image_offsets.npy"
    offsets = np.load(path)
    for at, value in ((slice(0, 2), 1), (-1, 12), (3, 9)):
        wrong = offsets.copy()
        wrong[at] = value
        np.save(path, wrong)
        rewrite_manifest(copy, "image_offsets")
        (problem,) = found(copy, processor).problems
        assert (problem.where, problem.reason) == ("index", "index")


def test_without_a_dataset(tmp_path, copy, processor):
    with pytest.raises(FileNotFoundError, match="no dataset directory"):
        found(tmp_path / "absent", processor)
    (copy / MANIFEST).write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        found(copy, processor)
