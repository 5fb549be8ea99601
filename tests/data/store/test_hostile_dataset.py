"""Datasets and plans of strangers: nothing outside the directory is read, and every error names the file."""

from __future__ import annotations

import collections
import dataclasses
import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from phivision_jax.batch import RowShape
from phivision_jax.cli.data_view import show
from phivision_jax.data.feed.pipeline import batches
from phivision_jax.data.plan.mixture import Mixture
from phivision_jax.data.plan.plan import Plan, make_plan
from phivision_jax.data.quarantine import BadRecord, Quarantined, RunLog, read_quarantine
from phivision_jax.data.sources.item_options import ItemOptions
from phivision_jax.data.sources.open_source import open_source
from phivision_jax.data.store.dataset import MANIFEST, Dataset, Index, describe_file
from phivision_jax.data.store.exporting import export
from phivision_jax.data.store.integrity import validate
from phivision_jax.data.view.show import record_section
from phivision_jax.io import work
from tests.support.datasets import write_dataset
from tests.support.mutations import survivors
from tests.support.records import make_record, mixed_records

SHAPE = RowShape(length=512, vision_rows=1, num_patches=128)
MUTATIONS = 2_000


@pytest.fixture(scope="module")
def sound(tmp_path_factory, processor) -> Path:
    return write_dataset(tmp_path_factory.mktemp("sound") / "set", mixed_records(6), processor).directory


@pytest.fixture
def copy(sound, tmp_path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "set"))


def edit_manifest(directory: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((directory / MANIFEST).read_text())
    edit(manifest)
    (directory / MANIFEST).write_text(json.dumps(manifest))


def forge_first_record(directory: Path, **fields: Any) -> None:
    """Write other fields into the first record, with a manifest that fits."""
    dataset = Dataset.open(directory)
    names = ("id", "source", "images", "messages", "mode", "task", "metadata", "lineage")
    records = [{name: getattr(dataset[i], name) for name in names} for i in range(len(dataset))]
    (shard,) = dataset.manifest["shards"]
    writer = ArrayRecordWriter(str(directory / shard["file"]), "group_size:1")
    for record in [records[0] | fields, *records[1:]]:
        writer.write(msgpack.packb(record))
    writer.close()
    described = describe_file(directory, shard["file"]) | {"records": shard["records"]}
    edit_manifest(directory, lambda manifest: manifest.update(shards=[described]))


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"images": ["/etc/passwd"]}, r"images\[0\] must be bytes, not '/etc/passwd'"),
        ({"images": ["secret.png"]}, r"images\[0\] must be bytes, not 'secret\.png'"),
        ({"images": ["http://localhost/a.png"]}, r"images\[0\] must be bytes, not 'http"),
        ({"images": [{"path": "secret.png"}]}, r"images\[0\] must be bytes, not \{'path'"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "a message has no known role, or its content is no text"),
        ({"messages": [{"role": "user", "content": [1]}]}, "a message has no known role, or its content is no text"),
        ({"messages": ["user"]}, r"messages\[0\] must be a group of fields, not 'user'"),
        ({"id": 3}, "id must be a string, not 3"),
        ({"lineage": "abc"}, "lineage must be a list, each item a string, not 'abc'"),
        ({"extra": 1}, "there is no field 'extra'"),
    ],
)
def test_forged_record_is_refused_by_every_reader(copy, processor, tmp_path, fields, what, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.png").write_bytes(make_record(0).images[0])
    forge_first_record(copy, **fields)
    dataset = Dataset.open(copy)
    with pytest.raises(BadRecord, match=what):
        dataset[0]
    with pytest.raises(BadRecord, match=r"records-00000-000\.array_record cannot be read: "):
        export(dataset, tmp_path / "out", "messages", progress=False)
    assert not (tmp_path / "out").exists()
    with pytest.raises(BadRecord, match=what):
        record_section(dataset, processor, 0)
    (problem,) = validate(copy, workers=0, progress=False).problems
    assert problem.reason == "unreadable" and re.search(what, problem.detail)
    plan = make_plan([dataset], Mixture.from_directories(copy), processor, SHAPE)
    failed = [
        bad for _, info in batches([dataset], plan, processor, batch_rows=1, num_threads=0) for bad in info.failed
    ]
    assert failed and {bad.reason for bad in failed} == {"unreadable"}


@pytest.mark.parametrize("name", ["../other/shard", "/etc/passwd", "./records-00000-000.array_record", "a\0b", "link"])
@pytest.mark.parametrize("entry", ["shards", "index"])
def test_files_outside_the_dataset_are_refused(copy, tmp_path, entry, name):
    shard = copy / Dataset.open(copy).manifest["shards"][0]["file"]
    (tmp_path / "other").mkdir()
    shutil.copy(shard, tmp_path / "other" / "shard")
    (copy / "link").symlink_to(tmp_path / "other" / "shard")
    edit_manifest(copy, lambda manifest: manifest[entry][0].update(file=name))
    for reader in (Dataset.open, lambda path: open_source(path, options=ItemOptions())):
        if entry == "shards" or reader is Dataset.open:
            with pytest.raises(ValueError, match="is no file of this directory, or is a link") as error:
                reader(copy)
            assert str(copy) in str(error.value)
    problems = validate(copy, workers=0, progress=False).problems
    assert problems and all(problem.reason == "file" for problem in problems)


def test_linked_index_is_refused(copy, tmp_path):
    shutil.move(copy / "index", tmp_path / "index")
    (copy / "index").symlink_to(tmp_path / "index")
    with pytest.raises(ValueError, match=r"index/text_tokens\.npy is no file of this directory"):
        Dataset.open(copy)
    shutil.move(copy, tmp_path / "moved")
    (tmp_path / "alias").symlink_to(tmp_path / "moved")  # a link to the dataset itself is not in it
    (tmp_path / "moved" / "index").unlink()
    shutil.move(tmp_path / "index", tmp_path / "moved" / "index")
    assert Dataset.open(tmp_path / "alias")[1].images


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("modes", lambda a: np.full_like(a, 2)),
        ("modes", lambda a: np.full_like(a, -1)),
        ("tasks", lambda a: np.full_like(a, 200)),
        ("text_tokens", lambda a: -a),
        ("image_sizes", lambda a: a * 0),
        ("image_sizes", lambda a: a * 10**6),
        ("image_offsets", lambda a: a[::-1]),
        ("image_offsets", lambda a: a + 1),
    ],
)
def test_index_out_of_range_is_refused(copy, processor, name, change):
    path = copy / "index" / f"{name}.npy"
    np.save(path, change(np.load(path)))
    edit_manifest(copy, lambda m: m.update(index=[describe_file(copy, f["file"]) for f in m["index"]]))
    dataset = Dataset.open(copy)
    with pytest.raises(ValueError, match=f"the index of {copy} is damaged"):
        make_plan([dataset], Mixture.from_directories(copy), processor, SHAPE)
    with pytest.raises(ValueError, match=f"the index of {copy} is damaged"):
        show((copy,), out=copy / "page.html")
    (problem,) = validate(copy, workers=0, progress=False).problems
    assert (problem.where, problem.reason) == ("index", "index")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("examples", lambda a: a + 5),
        ("sources", lambda a: a + 1),
        ("row_offsets", lambda a: np.append(a, a[-1] + 1)),
        ("row_offsets", lambda a: np.append(0, a[::-1])),
        ("row_offsets", lambda a: a[1:]),
        ("row_offsets", lambda a: a[:0]),
    ],
)
def test_forged_plan_of_records_that_do_not_exist_is_refused(copy, processor, tmp_path, name, change):
    dataset = Dataset.open(copy)
    plan = make_plan([dataset], Mixture.from_directories(copy), processor, RowShape(80, 1, 80))
    forged = dataclasses.replace(plan, **{name: change(getattr(plan, name)).astype(getattr(plan, name).dtype)})
    forged.save(tmp_path / "plan")
    with pytest.raises(ValueError, match="the plan names records that do not exist; make it again"):
        batches([dataset], Plan.load(tmp_path / "plan"), processor, batch_rows=1)


@pytest.mark.parametrize("content", ["", "[]", "null", '{"schema": 4', "\0\0\0\0", '{"schema": 4}', "<!doctype html>"])
def test_manifest_and_key_of_another_kind_are_named(copy, content):
    (copy / MANIFEST).write_text(content)
    with pytest.raises(ValueError, match=r"manifest\.json"):
        Dataset.open(copy)
    (copy / work.KEY).write_text(content)
    job: Any = collections.namedtuple("Job", "key")(lambda: {"a": 1})
    with pytest.raises(FileExistsError, match=r"work\.json|was made from other data"):
        work.run(job, copy, finish=lambda *_: None)


# ---------------------------------------------------------------------------------------------------------------------
# Mutations of files.


def flips(content: bytes, count: int) -> Iterator[bytes]:
    """Flip, insert, remove, zero or repeat some bytes, most of them near the beginning, or cut the end."""
    numbers = random.Random(0)
    for _ in range(count):
        changed = bytearray(content)
        i = min(int(numbers.expovariate(1 / 60)), len(changed) - 1)
        j = min(len(changed), i + numbers.choice([1, 1, 2, 8, 100]))
        changed[i:j] = numbers.choice(
            [numbers.randbytes(j - i), b"", bytes(j - i), changed[i:j] * 3, b"\xff" * (j - i)]
        )
        yield bytes(changed[: i if numbers.random() < 0.1 else None])


def check_arrays(folder: Path, use: Callable[[], Any]) -> int:
    """Use a folder of arrays with one of them damaged; return how often it was refused."""
    refused, names = 0, sorted(folder.glob("*.npy"))
    for path in names:
        content = path.read_bytes()
        for changed in flips(content, MUTATIONS // len(names)):
            path.write_bytes(changed)
            try:
                use()
            except (ValueError, OSError) as error:
                refused += 1
                assert str(folder.parent) in str(error) and len(str(error)) < 600 and str(error).isprintable(), error
        path.write_bytes(content)
    use()
    return refused


def test_mutated_manifests_are_read_or_refused(copy):
    def read(mutated: bytes) -> None:
        (copy / MANIFEST).write_bytes(mutated)
        dataset = Dataset.open(copy)
        dataset.index.check(copy)
        assert dataset[0].messages

    assert survivors((copy / MANIFEST).read_bytes(), read, str(copy), count=MUTATIONS) < MUTATIONS * 0.8


@pytest.mark.filterwarnings("ignore::SyntaxWarning")  # of NumPy, which parses headers as Python
def test_mutated_indexes_are_read_or_refused(copy):
    manifest = Dataset.open(copy).manifest

    def use() -> None:
        index = Index.open(copy, manifest)
        index.check(copy)
        assert [index.sizes_of(i) for i in range(len(index))]

    assert check_arrays(copy / "index", use) > MUTATIONS * 0.2


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
def test_mutated_plans_are_read_or_refused(copy, processor, tmp_path):
    place = tmp_path / "plan"
    make_plan([Dataset.open(copy)], Mixture.from_directories(copy), processor, SHAPE).save(place)
    content = (place / "plan.json").read_bytes()

    def use() -> None:
        loaded = Plan.load(place)
        assert loaded.rows(0, 2) and loaded.summary() and loaded.patch_limits is not None

    def read(mutated: bytes) -> None:
        (place / "plan.json").write_bytes(mutated)
        use()

    assert survivors(content, read, str(place), count=MUTATIONS // 2) < MUTATIONS * 0.4
    (place / "plan.json").write_bytes(content)
    assert check_arrays(place, use) > MUTATIONS * 0.3


def test_quarantined_items_keep_their_lines_short():
    bad = Quarantined("i" * 10**6, "s" * 10**6, "unread", "d" * 10**6, "w" * 10**6)
    assert len(bad.to_line()) < 2_000
    assert b"\\x1b[2J" in Quarantined("\x1b[2J", "s", "unread", "d", "w").to_line()


@pytest.mark.parametrize("line", [b"\0" * 50, b"[]", b"3", b'{"id": [1], "where": {}}', b'{"reason": 3}', b"{" * 9999])
def test_quarantine_of_a_run_ignores_lines_of_another_kind(tmp_path, line):
    file = tmp_path / "quarantine.jsonl"
    file.write_bytes(line + b"\n")
    log = RunLog(file, max_share=0.5)
    bad = Quarantined("a", "s", "unreadable", "d", "w")
    log.add([bad], 1)
    RunLog(file, max_share=0.5).add([bad], 1)
    assert [row["id"] for row in read_quarantine(file)] == ["a"]
