"""Checkpoints in a bucket keep what those on a disk promise: damage is found, what is unfinished is no step."""

import json
import random
from pathlib import Path

import pytest

from benchmarks import damage
from benchmarks.damage import NEW, OLD, make_state, make_tail, restore, same
from phivision_jax.checkpoint import layout, manifest
from phivision_jax.checkpoint.layout import CHECKPOINTS, ORBAX_MARK, SEALED
from phivision_jax.checkpoint.manager import CheckpointError, RunCheckpoints
from phivision_jax.checkpoint.manifest import MANIFEST, parse
from phivision_jax.io import storage


def save(checkpoints, assets, step, metrics=None):
    checkpoints.save(make_state(step), make_tail(), {"model": {}, "run": {}}, assets, metrics)


def names(run) -> set[str]:
    return {child.name for child in storage.children(run / CHECKPOINTS)}


@pytest.fixture(scope="module")
def assets(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    (folder / "tokenizer.json").write_text(json.dumps({f"token {i}": i for i in range(200)}))
    return folder


@pytest.fixture(scope="module")
def made(emulator, assets, tmp_path_factory) -> Path:
    """Two steps, written to the bucket and fetched, so that each test can have them there again."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in emulator.environment.items():
            patch.setenv(name, value)
        run = storage.location("gs://bucket/made")
        checkpoints = RunCheckpoints(run, keep=2)
        for step in (OLD, NEW):
            save(checkpoints, assets, step)
        checkpoints.close()
        storage.download(run, folder)
    return folder


@pytest.fixture
def run(made, bucket):
    run = storage.location(bucket)
    storage.upload(made, run)
    return run


def test_what_is_restored_is_what_was_saved(run, made, tmp_path):
    state, told = restore(run)
    assert same(state, make_state(NEW)) and not told
    assert names(run) == {str(OLD), str(NEW), SEALED}
    assert layout.find(run) == run / CHECKPOINTS / str(NEW)
    assert layout.find(str(run)) == run / CHECKPOINTS / str(NEW)
    listed = parse((run / CHECKPOINTS / str(NEW) / MANIFEST).read_bytes())
    assert listed.keys() | {MANIFEST} == storage.files(run / CHECKPOINTS / str(NEW)).keys()
    assert same(restore(made)[0], make_state(NEW))  # fetched, it is a run like any other


def test_files_are_read_range_by_range(run, made, monkeypatch):
    monkeypatch.setattr(manifest, "_FETCH_BYTES", 100)
    step = f"{CHECKPOINTS}/{NEW}"
    listed = parse((made / step / MANIFEST).read_bytes())
    assert manifest.describe(run / step) == manifest.describe(made / step) == listed
    assert max(size for _, size in listed.values()) > 1000
    shares = [manifest.describe(run / step, share, 3) for share in range(3)]
    assert shares[0] | shares[1] | shares[2] == listed and sum(map(len, shares)) == len(listed)


def some(made: Path) -> list[str]:
    found = sorted(parse((made / CHECKPOINTS / str(NEW) / MANIFEST).read_bytes()))
    data = [name for name in found if "/d/" in name]
    return [data[0], data[-1], "meta/metadata", "assets/tokenizer.json", "params/manifest.ocdbt"]


@pytest.mark.parametrize(
    ("what", "change"), [(0, damage.flip), (1, damage.delete), (2, damage.flip), (3, damage.delete), (4, damage.flip)]
)
def test_a_change_in_any_file_falls_back_and_names_it(run, made, what, change):
    name = some(made)[what]
    change(run / CHECKPOINTS / str(NEW) / name, random.Random(what))
    state, told = restore(run)
    assert same(state, make_state(OLD))
    assert f"checkpoint {NEW} is damaged: its file {name} " in told and f"goes on from {OLD}" in told
    assert names(run) == {str(OLD), f"damaged-0000{NEW}", SEALED}


def test_unfinished_is_no_step_and_in_nobodys_way(run, assets):
    """Killed while Orbax was writing: everything may be there but its mark."""
    for name in storage.files(run / CHECKPOINTS / str(NEW)):
        if name not in (ORBAX_MARK, MANIFEST):
            (run / CHECKPOINTS / "30" / name).write_bytes((run / CHECKPOINTS / str(NEW) / name).read_bytes())
    checkpoints = RunCheckpoints(run, keep=2)
    assert checkpoints.latest == NEW and layout.find(run).name == str(NEW)
    state, told = restore(run)
    assert same(state, make_state(NEW)) and not told and "30" in names(run)
    save(checkpoints, assets, 30)
    checkpoints.close()
    assert names(run) == {str(NEW), "30", SEALED}
    assert same(restore(run)[0], make_state(30))


def test_a_sealed_step_without_its_mark_is_damaged_and_kept_aside(run, assets):
    (run / CHECKPOINTS / str(NEW) / ORBAX_MARK).unlink()
    told: list[str] = []
    checkpoints = RunCheckpoints(run, keep=2, say=told.append)
    assert checkpoints.latest == NEW
    state, _, _ = checkpoints.restore(damage.abstract(make_state(0)), damage.abstract(make_tail()))
    assert same(state, make_state(OLD)) and f"its file {ORBAX_MARK} is missing" in told[0]
    save(checkpoints, assets, NEW)
    checkpoints.close()
    assert names(run) == {str(OLD), str(NEW), f"damaged-0000{NEW}", SEALED}


def test_killed_before_the_manifest_the_step_is_good_and_gets_one(run):
    newest = run / CHECKPOINTS / str(NEW)
    (newest / MANIFEST).unlink()
    (run / CHECKPOINTS / SEALED).write_text(json.dumps([OLD]))
    (run / CHECKPOINTS / ".sealing-30" / "1").write_text("of a step that was never written")
    state, told = restore(run)
    assert same(state, make_state(NEW)) and not told
    assert (newest / MANIFEST).exists() and json.loads((run / CHECKPOINTS / SEALED).read_text()) == [OLD, NEW]
    assert names(run) == {str(OLD), str(NEW), SEALED}


def test_all_gone_is_not_a_new_run(run):
    for step in (OLD, NEW):
        storage.remove(run / CHECKPOINTS / str(step))
    with pytest.raises(CheckpointError, match="held checkpoint 20 and now holds none"):
        _ = RunCheckpoints(run, keep=2).latest


def test_kept_by_rule(bucket, assets):
    run = storage.location(bucket)
    assert RunCheckpoints(run, keep=1).latest is None
    checkpoints = RunCheckpoints(run, keep=1, keep_every=3, keep_best="-loss")
    for step, loss in enumerate((3.0, 1.0, 2.0, 4.0), 1):
        save(checkpoints, assets, step, {"loss": loss})
    checkpoints.close()
    assert names(run) == {"2", "3", "4", SEALED}


def test_the_log_is_safe_before_the_first_object_of_a_step(run, assets):
    seen: list[set[str]] = []
    checkpoints = RunCheckpoints(run, keep=2, before_save=lambda: seen.append(names(run)))
    save(checkpoints, assets, 30)
    checkpoints.close()
    assert seen == [{str(OLD), str(NEW), SEALED}]


def test_what_cannot_be_made_safe_is_not_saved(run, assets):
    def fail():
        raise storage.Unreachable(f"{run}: the bucket does not answer (refused); see to the network and try again")

    checkpoints = RunCheckpoints(run, keep=2, before_save=fail)
    with pytest.raises(
        CheckpointError, match=r"checkpoint 30 could not be written to gs://.*the bucket does not answer"
    ):
        save(checkpoints, assets, 30)
    checkpoints.close()
    assert names(run) == {str(OLD), str(NEW), SEALED}


def test_no_step_is_overlooked_when_the_bucket_does_not_answer(run, monkeypatch):
    """gcsfs then says of everything that it is no directory; a training must not begin anew for that."""
    monkeypatch.setattr("etils.epath.backend._FileSystemSpecBackend.isdir", lambda *_: False)
    assert RunCheckpoints(run, keep=2).latest == NEW and layout.find(run).name == str(NEW)


@pytest.mark.parametrize("sealed", [True, False])
def test_a_bucket_that_does_not_answer_is_no_damage(run, monkeypatch, sealed):
    if not sealed:
        (run / CHECKPOINTS / str(NEW) / MANIFEST).unlink()
        (run / CHECKPOINTS / SEALED).write_text(json.dumps([OLD]))

    def fail(*_, **__):
        raise storage.Unreachable("no answer")

    with monkeypatch.context() as patch, pytest.raises(storage.Unreachable, match="no answer"):
        if sealed:
            patch.setattr(storage, "read_range", fail)
        else:
            patch.setattr("orbax.checkpoint.Checkpointer.restore", lambda *_, **__: 1 / 0)
            patch.setattr(storage, "check", fail)
        restore(run)
    assert str(NEW) in names(run) and same(restore(run)[0], make_state(NEW))
