"""Saving the checkpoints of a run: which steps are kept, and what a failed save leaves behind."""

import json
import queue
import resource
import shutil
import subprocess
import sys
import threading

import jax
import pytest

from phivision_jax.checkpoint.layout import CHECKPOINTS, SAVED
from phivision_jax.checkpoint.manager import CheckpointError, RunCheckpoints
from tests.support.damage import NEW, OLD, make_state, make_tail, restore, same, save
from tests.support.launched import ENVIRONMENT
from tests.support.paths import ROOT


def steps(run):
    return sorted(int(path.name) for path in (run / CHECKPOINTS).iterdir() if path.name.isdecimal())


def names(run):
    return {path.name for path in (run / CHECKPOINTS).iterdir()}


def test_steps_are_kept_by_rule(empty_run):
    """The last two, multiples of 4, and the best; 5 has no metric, 6 no number."""
    checkpoints = RunCheckpoints(empty_run, keep=2, keep_every=4, keep_best="-loss")
    losses = {1: 5.0, 2: 3.0, 3: 1.0, 4: 2.0, 5: None, 6: float("nan"), 7: 4.0}
    for step, loss in losses.items():
        save(checkpoints, empty_run, step, {} if loss is None else {"loss": loss})
    checkpoints.close()
    assert steps(empty_run) == [3, 4, 6, 7]
    (empty_run / CHECKPOINTS / "3" / "meta" / "metadata").write_bytes(b"\xff")  # its metrics are unknown
    log = []
    checkpoints = RunCheckpoints(empty_run, keep=2, keep_every=4, keep_best="-loss", log=log.append)
    for step in (8, 9):
        save(checkpoints, empty_run, step, {"loss": step})
    checkpoints.close()
    assert steps(empty_run) == [4, 8, 9] and "checkpoint 3 is damaged: its file meta/metadata" in log[0]


def test_keep_best_may_change_between_starts(empty_run):
    """Accuracies are not compared with losses; metrics that were not asked for then are known."""
    checkpoints = RunCheckpoints(empty_run, keep=2, keep_best="accuracy")
    for step, metrics in ((1, {"accuracy": 0.0, "loss": 1.0}), (2, {"accuracy": 0.1})):
        save(checkpoints, empty_run, step, metrics)
    checkpoints.close()
    log = []
    checkpoints = RunCheckpoints(empty_run, keep=2, keep_best="-loss", log=log.append)
    for step, metrics in ((3, {}), (4, {"loss": 5.0}), (5, {"loss": 7.0})):
        save(checkpoints, empty_run, step, metrics)
    checkpoints.close()
    assert steps(empty_run) == [1, 4, 5] and not log


def test_full_disk_is_one_sentence_and_no_step(empty_run):
    """Files may not grow beyond 16 KiB while the second save runs."""
    checkpoints = RunCheckpoints(empty_run, keep=2)
    save(checkpoints, empty_run, OLD)
    checkpoints.wait()
    state = make_state(NEW)
    state["params"]["decoder"]["lm_head"]["kernel"] = jax.random.normal(jax.random.key(0), (200, 200))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16 << 10, hard))
    try:
        with pytest.raises(CheckpointError, match=r"checkpoint 20 could not be written to .*/checkpoints: .*too large"):
            checkpoints.save(state, make_tail(), {"model": {}, "run": {}}, empty_run / "assets")
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert steps(empty_run) == [OLD] and same(restore(empty_run)[0], make_state(OLD))
    save(checkpoints, empty_run, NEW)  # the error is raised once
    checkpoints.close()
    assert same(restore(empty_run)[0], make_state(NEW))


def test_directory_that_cannot_be_made_is_one_sentence(empty_run):
    """And no endless wait: Orbax's own thread that makes directories would have died unnoticed."""
    checkpoints = RunCheckpoints(empty_run, keep=2)
    save(checkpoints, empty_run, OLD)
    checkpoints.wait()
    obstacle = empty_run / CHECKPOINTS / f"{NEW}.orbax-checkpoint-tmp"
    obstacle.symlink_to("nowhere")
    messages = queue.SimpleQueue()

    def save_and_wait():
        try:
            save(checkpoints, empty_run, NEW)
            checkpoints.wait()
        except CheckpointError as error:
            messages.put(str(error))

    threading.Thread(target=save_and_wait, daemon=True).start()
    expected = f"checkpoint {NEW} could not be written to {empty_run / CHECKPOINTS}: "
    assert expected in messages.get(timeout=30)
    obstacle.unlink()
    save(checkpoints, empty_run, NEW)
    checkpoints.close()
    assert same(restore(empty_run)[0], make_state(NEW))


def test_vanished_directory_is_one_sentence(empty_run):
    checkpoints = RunCheckpoints(empty_run, keep=2)
    save(checkpoints, empty_run, OLD)
    checkpoints.wait()
    shutil.rmtree(empty_run / CHECKPOINTS)
    message = r"empty/checkpoints has disappeared during training: checkpoint 20 is not saved"
    with pytest.raises(CheckpointError, match=message):
        save(checkpoints, empty_run, NEW)


def test_check_reports_a_failed_save_without_waiting(empty_run, monkeypatch):
    checkpoints = RunCheckpoints(empty_run, keep=2)
    save(checkpoints, empty_run, OLD)
    checkpoints.check()
    checkpoints.wait()
    monkeypatch.setattr("orbax.checkpoint.CheckpointManager._finalize_checkpoint", lambda *_: 1 / 0)
    save(checkpoints, empty_run, NEW)
    with pytest.raises(CheckpointError, match=r"checkpoint 20 could not be written .*division by zero"):
        while checkpoints._saving is not None:
            checkpoints.check()


def test_unfinished_step_of_a_killed_process_is_removed(run):
    (run / CHECKPOINTS / "30.orbax-checkpoint-tmp").mkdir()
    assert same(restore(run)[0], make_state(NEW))
    checkpoints = RunCheckpoints(run, keep=2)
    save(checkpoints, run, 40)
    checkpoints.close()
    assert names(run) == {str(NEW), "40", SAVED}
    assert json.loads((run / CHECKPOINTS / SAVED).read_text()) == {"step": 40}


def test_keep_must_be_positive(empty_run):
    with pytest.raises(ValueError, match="keep_checkpoints is 0"):
        RunCheckpoints(empty_run, keep=0)


FULL = """
import resource, signal, sys
from pathlib import Path
import tests.conftest
from phivision_jax.checkpoint.manager import CheckpointError, RunCheckpoints
from tests.support.damage import NEW, OLD, make_run, save

run = Path(sys.argv[1])
make_run(run, (OLD,))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
checkpoints = RunCheckpoints(run, keep=2)
try:
    save(checkpoints, run, NEW)
    checkpoints.wait()
except CheckpointError as error:
    print(error, file=sys.stderr)
"""


def test_full_disk_prints_one_sentence(tmp_path):
    """A limit on the size of files takes the place of a full disk: no library prints anything beside the sentence."""
    words = [sys.executable, "-c", FULL, str(tmp_path / "run")]
    done = subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr.startswith(f"checkpoint {NEW} could not be written to "), done.stderr
    assert "File too large" in done.stderr and done.stderr.count("\n") == 1
