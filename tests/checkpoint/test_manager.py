"""Checkpoints of a run: what is kept, what is found damaged, and what a failed save leaves behind."""

import json
import os
import queue
import random
import resource
import shutil
import socket
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import damage
from benchmarks.damage import NEW, OLD, make_run, make_state, make_tail, restore, same
from phivision_jax import sharding
from phivision_jax.checkpoint import layout
from phivision_jax.checkpoint import manager as module
from phivision_jax.checkpoint.layout import CHECKPOINTS, CHECKSUMS, SEALED
from phivision_jax.checkpoint.manager import CheckpointError, RunCheckpoints
from phivision_jax.checkpoint.manifest import MANIFEST, parse, render
from tests.support.paths import ROOT, SUPPORT
from tests.support.runs import command, environment, finish, write_data


def save(checkpoints, run, step, state=None, metrics=None):
    checkpoints.save(state or make_state(step), make_tail(), {"model": {}, "run": {}}, run / "assets", metrics)


def steps(run):
    return sorted(int(path.name) for path in (run / CHECKPOINTS).iterdir() if path.name.isdecimal())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    run = tmp_path_factory.mktemp("made") / "run"
    make_run(run, (OLD, NEW))
    return run


@pytest.fixture
def run(made, tmp_path):
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def bare(tmp_path):
    """A run with assets and no checkpoint yet."""
    (tmp_path / "bare" / "assets").mkdir(parents=True)
    (tmp_path / "bare" / "assets" / "tokenizer.json").write_text("{}")
    return tmp_path / "bare"


def test_what_is_restored_is_what_was_saved(run):
    state, told = restore(run)
    assert same(state, make_state(NEW)) and not told
    assert layout.find(run).name == str(NEW)


def test_checksums_hold_on_another_mesh(bare):
    """Saved on eight devices, fsdp; restored on (fsdp 2, tensor 4) and, above, on one."""
    specs = {"kernel": PartitionSpec(None, "fsdp"), "scale": PartitionSpec(None, "fsdp")}

    def place(mesh, tree):
        def at(path, leaf):
            spec = specs.get(getattr(path[-1], "key", None), PartitionSpec()) if np.ndim(leaf) > 1 else PartitionSpec()
            return NamedSharding(mesh, spec)

        return jax.tree_util.tree_map_with_path(at, tree)

    state = make_state(OLD)
    eight = sharding.make_mesh({"fsdp": 8})
    checkpoints = RunCheckpoints(bare, keep=1)
    save(checkpoints, bare, OLD, jax.device_put(state, place(eight, state)))
    checkpoints.close()
    other = sharding.make_mesh({"fsdp": 2, "tensor": 4})
    abstract = jax.tree.map(
        lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), state, place(other, state)
    )
    restored, _, _ = RunCheckpoints(bare, keep=1).restore(abstract, damage.abstract(make_tail()))
    assert same(restored, state)
    assert not restored["params"]["decoder"]["lm_head"]["kernel"].is_fully_replicated


def test_ten_flips_truncations_and_deletions(tmp_path):
    table = damage.measure(10, seed=0, directory=tmp_path, most=3)
    assert table["newest of two"] == {
        what: {damage.FELL_BACK: count} for what, count in (("flip", 10), ("truncate", 3), ("delete", 3))
    }
    assert table["only one"] == {
        what: {damage.STOPPED: count} for what, count in (("flip", 10), ("truncate", 3), ("delete", 3))
    }
    for outcomes in table["newest, no manifest yet"].values():
        assert outcomes.keys() <= {damage.UNSEALED_FELL_BACK, damage.HARMLESS}


@pytest.mark.parametrize("name", ["params/decoder/layers/up_proj/kernel", "params/vision_tail/head/probe",
                                  "opt_state/mu/decoder/lm_head/kernel", "opt_state/count"])  # fmt: skip
def test_a_bit_lost_on_the_way_to_the_disk_is_seen(bare, monkeypatch, name):
    """Files and manifest agree, but not with what stood on the device: only the array's own checksum tells."""
    checkpoints = RunCheckpoints(bare, keep=2)
    save(checkpoints, bare, OLD)
    checkpoints.wait()
    true = module.checksums
    monkeypatch.setattr(module, "checksums", lambda tree: true(tree) | {name: true(tree)[name] ^ 1})
    save(checkpoints, bare, NEW)
    checkpoints.close()
    monkeypatch.setattr(module, "checksums", true)
    state, told = restore(bare)
    assert same(state, make_state(OLD))
    assert told.startswith(f"checkpoint {NEW} is damaged: its array {name} does not hold what was saved")
    assert told.endswith(f"It is now checkpoints/damaged-0000{NEW}; training goes on from {OLD}")


def test_after_a_fall_back_the_same_step_is_saved_again(run):
    (run / CHECKPOINTS / str(NEW) / "params" / "manifest.ocdbt").write_bytes(b"")
    for _ in range(2):  # and damaged again: the first damaged one is not overwritten
        checkpoints = RunCheckpoints(run, keep=2, say=lambda _: None)
        args = damage.abstract(make_state(0)), damage.abstract(make_tail())
        assert int(checkpoints.restore(*args)[0]["step"]) == OLD
        save(checkpoints, run, NEW)
        checkpoints.close()
        assert steps(run) == [OLD, NEW] and same(restore(run)[0], make_state(NEW))
        (run / CHECKPOINTS / str(NEW) / "assets" / "tokenizer.json").unlink()
    assert len(list((run / CHECKPOINTS).glob("damaged-*"))) == 2


def test_all_damaged_nothing_is_touched(run):
    (run / CHECKPOINTS / str(OLD) / "meta" / "metadata").unlink()
    (run / CHECKPOINTS / str(NEW) / "_CHECKPOINT_METADATA").unlink()
    before = sorted(run.rglob("*"))
    for _ in range(2):
        with pytest.raises(CheckpointError, match="in 20, its file _CHECKPOINT_METADATA is missing; in 10, its file"):
            restore(run)
    assert sorted(run.rglob("*")) == before


def test_all_gone_is_not_a_new_run(run, bare):
    shutil.rmtree(run / CHECKPOINTS / str(OLD))
    shutil.rmtree(run / CHECKPOINTS / str(NEW))
    with pytest.raises(CheckpointError, match="held checkpoint 20 and now holds none"):
        _ = RunCheckpoints(run, keep=2).latest
    assert RunCheckpoints(bare, keep=2).latest is None


def test_another_model_is_no_damage(run):
    state = damage.abstract(make_state(0))
    state["params"]["decoder"]["lm_head"] = damage.abstract({"kernel": np.zeros((3, 3), np.float32)})
    with pytest.raises(CheckpointError, match=r"every file of .*/20 is whole, but Orbax cannot restore it here"):
        RunCheckpoints(run, keep=2).restore(state, damage.abstract(make_tail()))
    assert steps(run) == [OLD, NEW]


def test_killed_before_the_manifest_the_step_is_good_and_gets_one(run):
    newest = run / CHECKPOINTS / str(NEW)
    (newest / MANIFEST).unlink()
    (run / CHECKPOINTS / SEALED).write_text(json.dumps([OLD]))
    checkpoints = RunCheckpoints(run, keep=2)
    state, _, _ = checkpoints.restore(damage.abstract(make_state(0)), damage.abstract(make_tail()))
    checkpoints.close()
    assert same(state, make_state(NEW))
    assert (newest / MANIFEST).exists() and json.loads((run / CHECKPOINTS / SEALED).read_text()) == [OLD, NEW]


def test_a_run_from_before_there_were_checksums(run):
    (run / CHECKPOINTS / SEALED).unlink()
    for step in (OLD, NEW):
        path = run / CHECKPOINTS / str(step) / "meta" / "metadata"
        meta = json.loads(path.read_text())
        del meta[CHECKSUMS]
        path.write_text(json.dumps(meta))
        (run / CHECKPOINTS / str(step) / MANIFEST).unlink()
    state, told = restore(run)
    assert same(state, make_state(NEW)) and "20 was written without checksums" in told


def test_kept_by_rule(bare):
    """The last two, multiples of 4, and the best; 5 has no metric, 6 no number."""
    checkpoints = RunCheckpoints(bare, keep=2, keep_every=4, keep_best="-loss")
    losses = {1: 5.0, 2: 3.0, 3: 1.0, 4: 2.0, 5: None, 6: float("nan"), 7: 4.0}
    for step, loss in losses.items():
        save(checkpoints, bare, step, metrics={} if loss is None else {"loss": loss})
    checkpoints.close()
    assert steps(bare) == [3, 4, 6, 7]
    (bare / CHECKPOINTS / "3" / "metrics" / "metrics").write_bytes(b"\xff")  # what Orbax stumbles over at its start
    told = []
    checkpoints = RunCheckpoints(bare, keep=2, keep_every=4, keep_best="-loss", say=told.append)
    for step in (8, 9):
        save(checkpoints, bare, step, metrics={"loss": step})
    checkpoints.close()
    assert steps(bare) == [4, 8, 9] and "checkpoint 3 is damaged: its file metrics/metrics" in told[0]


def test_a_run_that_changes_its_mind_what_is_best(bare):
    """Accuracies, the older ones without their name, are not compared with losses."""
    checkpoints = RunCheckpoints(bare, keep=2, keep_best="accuracy")
    for step, accuracy in ((1, 0.0), (2, 0.1)):
        save(checkpoints, bare, step, metrics={"accuracy": accuracy})
    checkpoints.close()
    rating = bare / CHECKPOINTS / "1" / "metrics" / "metrics"
    assert json.loads(rating.read_text()) == {"accuracy": 0.0}
    rating.write_text('{"value": 0.0}')
    told = []
    checkpoints = RunCheckpoints(bare, keep=2, keep_best="-loss", say=told.append)
    for step, metrics in ((3, {}), (4, {"loss": 5.0}), (5, {"loss": 7.0}), (6, {"loss": 9.0})):
        save(checkpoints, bare, step, metrics=metrics)
    checkpoints.close()
    assert steps(bare) == [4, 5, 6] and not told


def test_a_full_disk_is_a_sentence_and_no_step(bare):
    """Files may not grow beyond 16 KiB while the second save runs."""
    checkpoints = RunCheckpoints(bare, keep=2)
    save(checkpoints, bare, OLD)
    checkpoints.wait()
    state = make_state(NEW)
    state["params"]["decoder"]["lm_head"]["kernel"] = jax.random.normal(jax.random.key(0), (200, 200))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16 << 10, hard))
    try:
        with pytest.raises(CheckpointError, match=r"checkpoint 20 could not be written to .*/checkpoints: .*too large"):
            save(checkpoints, bare, NEW, state)
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert steps(bare) == [OLD] and same(restore(bare)[0], make_state(OLD))
    save(checkpoints, bare, NEW)  # the error was told once
    checkpoints.close()
    assert same(restore(bare)[0], make_state(NEW))


def test_a_step_whose_directory_cannot_be_made_is_a_sentence(bare):
    """And no wait without end: Orbax's own thread that makes directories would have died of it unseen."""
    checkpoints = RunCheckpoints(bare, keep=2)
    save(checkpoints, bare, OLD)
    checkpoints.wait()
    in_the_way = bare / CHECKPOINTS / f"{NEW}.orbax-checkpoint-tmp"
    in_the_way.symlink_to("nowhere")
    said = queue.SimpleQueue()

    def save_and_wait():
        try:
            save(checkpoints, bare, NEW)
            checkpoints.wait()
        except CheckpointError as error:
            said.put(str(error))

    threading.Thread(target=save_and_wait, daemon=True).start()
    assert f"checkpoint {NEW} could not be written to {bare / CHECKPOINTS}: " in said.get(timeout=30)
    in_the_way.unlink()
    save(checkpoints, bare, NEW)
    checkpoints.close()
    assert same(restore(bare)[0], make_state(NEW))


def test_a_directory_that_disappears(bare):
    checkpoints = RunCheckpoints(bare, keep=2)
    save(checkpoints, bare, OLD)
    checkpoints.wait()
    shutil.rmtree(bare / CHECKPOINTS)
    with pytest.raises(CheckpointError, match=r"bare/checkpoints has disappeared while training: checkpoint 20 is not"):
        save(checkpoints, bare, NEW)


def test_what_a_kill_left_is_swept_away(run):
    (run / CHECKPOINTS / "30.orbax-checkpoint-tmp").mkdir()
    (run / CHECKPOINTS / ".sealing-30").mkdir()
    assert same(restore(run)[0], make_state(NEW))
    checkpoints = RunCheckpoints(run, keep=2)
    save(checkpoints, run, 40)
    checkpoints.close()
    names = {path.name for path in (run / CHECKPOINTS).iterdir()}
    assert names == {str(NEW), "40", SEALED}


def test_a_manifest_admits_no_change():
    text = render({"params/d/a b": (7, 3), "meta": (0, 0)})
    assert parse(text) == {"params/d/a b": (7, 3), "meta": (0, 0)} and parse(render({})) == {}
    for bit in range(8 * len(text)):
        changed = bytearray(text)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError):
            parse(bytes(changed))
    with pytest.raises(ValueError):
        parse(b"")


def test_keep_must_be_positive(bare):
    with pytest.raises(ValueError, match="keep_checkpoints is 0"):
        RunCheckpoints(bare, keep=0)


def two_processes(run, what) -> list[str]:
    """What each of two processes of ``jax.distributed`` prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = {"PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    words = [sys.executable, str(SUPPORT / "saving_host.py"), address]
    hosts = [
        subprocess.Popen([*words, str(number), str(run), what], env=os.environ | flags, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for number in (0, 1)
    ]  # fmt: skip
    said = [host.communicate(timeout=300) for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], said
    return [output for output, _ in said]


def test_two_processes_share_the_reading_and_agree(bare):
    """What only one of them has read and found damaged, both leave; one process restores what two have saved."""
    two_processes(bare, "save")
    assert steps(bare) == [10, 20, 30]
    assert same(restore(bare)[0], make_state(30))
    for step, share in ((30, 1), (20, 0)):
        layout = bare / CHECKPOINTS / str(step)
        damage.flip(layout / sorted(parse((layout / MANIFEST).read_bytes()))[share::2][0], random.Random(0))
    weights = sorted(name for name in parse((layout / MANIFEST).read_bytes()) if name.startswith(("meta", "para")))
    damage.flip(layout / weights[1], random.Random(0))  # in 20: the second process reads it
    first, second = two_processes(bare, "restore")
    assert all(f"refused: {layout} is damaged: its file {weights[1]} does" in said for said in (first, second))
    assert "restored 10 10" in first and "restored 10 10" in second
    assert "checkpoint 30 is damaged" in first and "checkpoint 20 is damaged" in first and "It is now" not in second
    assert steps(bare) == [10, 40] and same(restore(bare)[0], make_state(40))


@pytest.mark.slow
def test_train_says_it_in_one_sentence(tmp_path):
    """The newest damaged: training goes on from the one before. All damaged: one sentence, not zero."""
    run, data = tmp_path / "run", tmp_path / "data"
    data.mkdir()
    write_data(data, sizes=100)
    words = command(data, run, "--config.optim.steps=6", "--config.data.eval_path=", "--config.log_every=1")
    finish(words)
    assert steps(run) == [3, 6]
    draw = random.Random(0)
    damage.flip(max((run / CHECKPOINTS / "6").rglob("d/*"), key=lambda path: path.stat().st_size), draw)
    output = finish(words)
    assert "checkpoint 6 is damaged: its file" in output and "continuing from step 3" in output
    assert steps(run) == [3, 6]
    for step in (3, 6):
        damage.flip(run / CHECKPOINTS / str(step) / "meta" / "metadata", draw)
    done = subprocess.run(words, cwd=ROOT, env=environment(),
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "holds no checkpoint that is whole: in 6, its file meta/metadata does not hold the bytes" in done.stderr
