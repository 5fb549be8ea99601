"""Restoring a run: from the newest intact step, on any mesh, with what is damaged named and set aside."""

import os
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from phivision_jax import sharding
from phivision_jax.checkpoint import arrays, layout
from phivision_jax.checkpoint.layout import CHECKPOINTS, Array
from phivision_jax.checkpoint.manager import CheckpointError, RunCheckpoints
from tests.support import damage
from tests.support.checkpoints import edit_meta
from tests.support.damage import NEW, OLD, abstract, make_run, make_state, make_tail, restore, same, save
from tests.support.paths import ROOT, SUPPORT


def steps(run):
    return sorted(int(path.name) for path in (run / CHECKPOINTS).iterdir() if path.name.isdecimal())


def test_restore_gives_what_was_saved(run):
    state, log = restore(run)
    assert same(state, make_state(NEW)) and not log
    assert layout.find(run).name == str(NEW)


def test_restore_on_another_mesh(empty_run):
    """Saved on eight devices along fsdp, restored on (fsdp 2, tensor 4)."""
    specs = {"kernel": PartitionSpec(None, "fsdp"), "scale": PartitionSpec(None, "fsdp")}

    def placement(mesh, tree):
        def named_sharding(path, leaf):
            spec = specs.get(getattr(path[-1], "key", None), PartitionSpec()) if np.ndim(leaf) > 1 else PartitionSpec()
            return NamedSharding(mesh, spec)

        return jax.tree_util.tree_map_with_path(named_sharding, tree)

    state = make_state(OLD)
    eight = sharding.make_mesh({"fsdp": 8})
    checkpoints = RunCheckpoints(empty_run, keep=1)
    placed = jax.device_put(state, placement(eight, state))
    checkpoints.save(placed, make_tail(), {"model": {}, "run": {}}, empty_run / "assets")
    checkpoints.close()
    other = sharding.make_mesh({"fsdp": 2, "tensor": 4})
    target = jax.tree.map(
        lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), state, placement(other, state)
    )
    restored, _, _ = RunCheckpoints(empty_run, keep=1).restore(target, abstract(make_tail()))
    assert same(restored, state)
    assert not restored["params"]["decoder"]["lm_head"]["kernel"].is_fully_replicated


@pytest.mark.parametrize("kept", [(OLD, NEW), (NEW,)])
def test_damage_falls_back_or_stops(tmp_path, kept):
    """``benchmarks/damage.py`` does more of it."""
    make_run(tmp_path / "run", kept)
    newest = f"{CHECKPOINTS}/{NEW}"
    table = damage.measure(tmp_path / "run", newest, damage.judge_run, tmp_path, flips=8, seed=0, limit=4)
    expected = {damage.FELL_BACK if OLD in kept else damage.STOPPED, damage.HARMLESS}
    assert [counts.total() for counts in table.values()] == [8, 4, 4]
    assert all(counts.keys() <= expected for counts in table.values()), table


@pytest.mark.parametrize("name", ["params/decoder/layers/up_proj/kernel", "params/vision_tail/head/probe",
                                  "opt_state/mu/decoder/lm_head/kernel", "opt_state/count"])  # fmt: skip
def test_bit_lost_on_the_way_to_disk_is_detected(empty_run, monkeypatch, name):
    """The files are as they were written, but do not hold what was on the device."""
    checkpoints = RunCheckpoints(empty_run, keep=2)
    save(checkpoints, empty_run, OLD)
    checkpoints.wait()
    describe = arrays.describe

    def other(tree):
        found = describe(tree)
        return found | {name: Array(*found[name][:2], f"{int(found[name].checksum, 16) ^ 1:016x}")}

    with monkeypatch.context() as patch:
        patch.setattr(arrays, "describe", other)
        save(checkpoints, empty_run, NEW)
        checkpoints.close()
    state, log = restore(empty_run)
    assert same(state, make_state(OLD))
    assert log.startswith(f"checkpoint {NEW} is damaged: its array {name} does not hold what was saved")
    assert log.endswith(f"It is now checkpoints/damaged-0000{NEW}; training continues from {OLD}")


def test_array_missing_from_the_list_of_arrays_is_damage(run, newest):
    metadata = newest / "params" / "_METADATA"
    metadata.write_text(metadata.read_text().replace("up_proj", "up_prok"))
    state, log = restore(run)
    assert same(state, make_state(OLD))
    assert "its array params/decoder/layers/up_proj/kernel does not hold what was saved" in log


def test_step_is_saved_again_after_falling_back(run, newest):
    (newest / "params" / "manifest.ocdbt").write_bytes(b"")
    for _ in range(2):  # damaged again, the first damaged one is not overwritten
        checkpoints = RunCheckpoints(run, keep=2, log=lambda _: None)
        state, _, _ = checkpoints.restore(abstract(make_state(0)), abstract(make_tail()))
        assert int(state["step"]) == OLD
        save(checkpoints, run, NEW)
        checkpoints.close()
        assert steps(run) == [OLD, NEW] and same(restore(run)[0], make_state(NEW))
        (newest / "assets" / "tokenizer.json").unlink()
    assert len(list((run / CHECKPOINTS).glob("damaged-*"))) == 2


def test_nothing_is_changed_when_every_step_is_damaged(run, newest):
    (run / CHECKPOINTS / str(OLD) / "meta" / "metadata").unlink()
    (newest / "assets" / "tokenizer.json").unlink()
    before = sorted(run.rglob("*"))
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"in 20, its file assets/tokenizer.json is missing; in 10, its file"):
            restore(run)
    assert sorted(run.rglob("*")) == before


def test_loss_of_all_steps_is_not_a_new_run(run, empty_run):
    for step in (OLD, NEW):
        shutil.rmtree(run / CHECKPOINTS / str(step))
    with pytest.raises(CheckpointError, match="held checkpoint 20 and now holds none"):
        RunCheckpoints(run, keep=2).steps()
    assert RunCheckpoints(empty_run, keep=2).steps() == []


@pytest.mark.parametrize("kernel", [np.zeros((3, 3), np.float32), np.zeros((64, 16), np.float16), None])
def test_other_arrays_are_not_damage(run, kernel):
    state = abstract(make_state(0))
    state["params"]["decoder"]["lm_head"] = {} if kernel is None else abstract({"kernel": kernel})
    message = r"/20 is intact, but does not fit this run: its array params/decoder/lm_head/kernel is "
    with pytest.raises(CheckpointError, match=message):
        RunCheckpoints(run, keep=2).restore(state, abstract(make_tail()))
    assert steps(run) == [OLD, NEW]


def test_at_most_leaves_damaged_steps_in_place(run, newest):
    (newest / "meta" / "metadata").unlink()
    log = []
    checkpoints = RunCheckpoints(run, keep=2, log=log.append)
    state, _, _ = checkpoints.restore(abstract(make_state(0)), abstract(make_tail()), at_most=NEW)
    assert same(state, make_state(OLD)) and steps(run) == [OLD, NEW] and not log
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        RunCheckpoints(run, keep=2).restore(abstract(make_state(0)), abstract(make_tail()), at_most=OLD - 1)


def two_processes(run, action) -> list[str]:
    """The output of each of two processes of ``jax.distributed``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = {"PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    words = [sys.executable, str(SUPPORT / "saving_host.py"), address]
    hosts = [
        subprocess.Popen([*words, str(number), str(run), action], env=os.environ | flags, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for number in (0, 1)
    ]  # fmt: skip
    outputs = [host.communicate(timeout=300) for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], outputs
    return [output for output, _ in outputs]


def test_two_processes_agree_on_damage(empty_run):
    """Both fall back from 30, which only one of them cannot read, and from 20, in which an array is not what was saved;
    one process restores what two have saved.
    """
    two_processes(empty_run, "save")
    assert steps(empty_run) == [10, 20, 30]
    assert same(restore(empty_run)[0], make_state(30))
    checkpoint = empty_run / CHECKPOINTS / "20"
    saved = layout.read_meta(checkpoint)["arrays"]
    name = "params/decoder/lm_head/kernel"
    edit_meta(checkpoint, arrays=saved | {name: [*saved[name][:2], "0123456789abcdef"]})
    first, second = two_processes(empty_run, "restore")
    assert all(f"refused: {checkpoint} is damaged: its array params/" in output for output in (first, second))
    assert "restored 10 10" in first and "restored 10 10" in second
    assert "checkpoint 30 is damaged: its params/ cannot be read: unreadable in one process" in first
    assert "checkpoint 20 is damaged: its array params/" in first and "It is now" not in second
    assert steps(empty_run) == [10, 40] and same(restore(empty_run)[0], make_state(40))


@pytest.mark.parametrize("item", ["params", "opt_state", "meta", "assets"])
def test_step_that_lacks_an_item_falls_back(run, item):
    """As two runs in one directory could leave it."""
    shutil.rmtree(run / CHECKPOINTS / str(NEW) / item)
    assert RunCheckpoints(run, keep=2).meta()["step"] == OLD or item == "assets"
    state, log = restore(run)
    assert same(state, make_state(OLD)) and f"checkpoint {NEW} is damaged: its " in log and item in log
