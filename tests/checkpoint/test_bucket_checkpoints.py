"""Checkpoints in a bucket keep the promises of those on disk: damage is found, an unfinished step is none."""

import json
import random
from pathlib import Path

import pytest

from phivision_jax.checkpoint import layout
from phivision_jax.checkpoint.layout import CHECKPOINTS, ORBAX_MARK, SAVED
from phivision_jax.checkpoint.manager import CheckpointError, RunCheckpoints
from phivision_jax.io import storage
from tests.support import damage
from tests.support.damage import NEW, OLD, abstract, make_state, make_tail, restore, same


def save(checkpoints, assets, step, metrics=None):
    checkpoints.save(make_state(step), make_tail(), {"model": {}, "run": {}}, assets, metrics)


def names(run) -> set[str]:
    return {child.name for child in storage.children(run / CHECKPOINTS)}


@pytest.fixture(scope="module")
def assets(made_run) -> Path:
    return made_run / "assets"


@pytest.fixture(scope="module")
def saved_run(emulator, assets, tmp_path_factory) -> Path:
    """Two steps, written to the bucket and downloaded, so that each test can upload them again."""
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
def run(saved_run, bucket):
    run = storage.location(bucket)
    storage.upload(saved_run, run)
    return run


@pytest.fixture
def newest(run):
    return run / CHECKPOINTS / str(NEW)


def test_restore_from_bucket(run, saved_run, newest):
    state, log = restore(run)
    assert same(state, make_state(NEW)) and not log
    assert names(run) == {str(OLD), str(NEW), SAVED}
    assert layout.find(run) == layout.find(str(run)) == newest
    assert same(restore(saved_run)[0], make_state(NEW))  # downloaded, it is a run like any other


@pytest.mark.parametrize(
    ("name", "action"),
    [
        ("meta/metadata", damage.flip),
        ("assets/tokenizer.json", damage.delete),
        ("params/manifest.ocdbt", damage.flip),
        ("params/d/", damage.flip),
        ("opt_state/d/", damage.delete),
    ],
)
def test_damaged_object_falls_back(run, saved_run, newest, name, action):
    (path,) = [path for path in storage.files(newest) if path.startswith(name)]
    action(newest / path, random.Random(0))
    state, log = restore(run)
    assert same(state, make_state(OLD))
    assert f"checkpoint {NEW} is damaged: its " in log and f"continues from {OLD}" in log
    assert damage.names_problem(log, path)
    assert names(run) == {str(OLD), f"damaged-0000{NEW}", SAVED}


def test_unfinished_step_is_ignored(run, assets, newest):
    """As when killed while Orbax was writing: everything may be there but its mark."""
    for name in storage.files(newest):
        if name != ORBAX_MARK:
            (run / CHECKPOINTS / "30" / name).write_bytes((newest / name).read_bytes())
    checkpoints = RunCheckpoints(run, keep=2)
    assert max(checkpoints.steps()) == NEW and layout.find(run).name == str(NEW)
    state, log = restore(run)
    assert same(state, make_state(NEW)) and not log and "30" in names(run)
    save(checkpoints, assets, 30)
    checkpoints.close()
    assert names(run) == {str(NEW), "30", SAVED}
    assert same(restore(run)[0], make_state(30))


def test_saved_step_without_its_mark_is_damaged(run, assets, newest):
    """And kept: Orbax would remove it."""
    (newest / ORBAX_MARK).unlink()
    log: list[str] = []
    checkpoints = RunCheckpoints(run, keep=2, log=log.append)
    assert max(checkpoints.steps()) == NEW
    state, _, _ = checkpoints.restore(abstract(make_state(0)), abstract(make_tail()))
    assert same(state, make_state(OLD)) and f"its file {ORBAX_MARK} is missing" in log[0]
    save(checkpoints, assets, NEW)
    checkpoints.close()
    assert names(run) == {str(OLD), str(NEW), f"damaged-0000{NEW}", SAVED}


def test_step_saved_before_a_kill_is_intact(run):
    """Killed before saved.json was written."""
    (run / CHECKPOINTS / SAVED).write_text(json.dumps({"step": OLD}))
    state, log = restore(run)
    assert same(state, make_state(NEW)) and not log


def test_loss_of_all_steps_is_not_a_new_run(run):
    for step in (OLD, NEW):
        storage.remove(run / CHECKPOINTS / str(step))
    with pytest.raises(CheckpointError, match="held checkpoint 20 and now holds none"):
        RunCheckpoints(run, keep=2).steps()


def test_steps_are_kept_by_rule_in_bucket(bucket, assets):
    run = storage.location(bucket)
    assert RunCheckpoints(run, keep=1).steps() == []
    checkpoints = RunCheckpoints(run, keep=1, keep_every=3, keep_best="-loss")
    for step, loss in enumerate((3.0, 1.0, 2.0, 4.0), 1):
        save(checkpoints, assets, step, {"loss": loss})
    checkpoints.close()
    assert names(run) == {"2", "3", "4", SAVED}


def test_before_save_runs_before_the_first_object(run, assets):
    seen: list[set[str]] = []
    checkpoints = RunCheckpoints(run, keep=2, before_save=lambda: seen.append(names(run)))
    save(checkpoints, assets, 30)
    checkpoints.close()
    assert seen == [{str(OLD), str(NEW), SAVED}]


def test_nothing_is_saved_when_before_save_fails(run, assets):
    def fail():
        raise storage.Unreachable(f"{run}: the bucket does not answer (refused)")

    checkpoints = RunCheckpoints(run, keep=2, before_save=fail)
    with pytest.raises(
        CheckpointError, match=r"checkpoint 30 could not be written to gs://.*the bucket does not answer"
    ):
        save(checkpoints, assets, 30)
    checkpoints.close()
    assert names(run) == {str(OLD), str(NEW), SAVED}


def test_steps_are_found_when_gcsfs_reports_no_directories(run, monkeypatch):
    """As it does when the bucket does not answer; training must not start over for that."""
    monkeypatch.setattr("etils.epath.backend._FileSystemSpecBackend.isdir", lambda *_: False)
    assert max(RunCheckpoints(run, keep=2).steps()) == NEW and layout.find(run).name == str(NEW)


def test_unreachable_bucket_is_not_damage(run, monkeypatch):
    def fail(*_, **__):
        raise storage.Unreachable("no answer")

    with monkeypatch.context() as patch, pytest.raises(storage.Unreachable, match="no answer"):
        patch.setattr("orbax.checkpoint.PyTreeCheckpointHandler.restore", lambda *_, **__: 1 / 0)
        patch.setattr(storage, "check", fail)
        restore(run)
    assert str(NEW) in names(run) and same(restore(run)[0], make_state(NEW))
