"""Runs that something happens to: SIGTERM, poisoned batches, broken weights. Real processes."""

import json
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

import phivision_jax
from phivision_jax.checkpoint.layout import SAVED
from phivision_jax.training.telemetry.metrics import read_metrics
from tests.support.launched import under_launcher
from tests.support.paths import ROOT
from tests.support.runs import (
    ROWS,
    SHORT,
    command,
    compilations,
    environment,
    fail,
    finish,
    losses,
    plan_hash,
    records,
    validations,
)

POISONED = 6


def faulty(words: list[str]) -> list[str]:
    return [words[0], "tests/support/trouble.py", *words[2:]]


def terminate_when(words: list[str], log: Path, ready, env: dict[str, str]) -> str:
    """Start a command, SIGTERM it when it is ready, expect exit code 75; returns what it printed."""
    with log.open("w") as output:
        process = subprocess.Popen(words, cwd=ROOT, env=env, stdout=output, stderr=output)
        while process.poll() is None and not ready():
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 75, log.read_text()[-2000:]
    return log.read_text()


def test_sigterm_saves_and_resumes_to_equal_numbers(short_run, data, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    words = command(data, run, *SHORT)
    output = terminate_when(words, log, lambda: max(losses(run), default=0) >= 5, environment())
    stopped = re.search(r"asked to stop: step (\d+) of 12 is saved", output)
    assert stopped and (run / "checkpoints" / stopped[1]).is_dir()
    assert f"continuing from step {stopped[1]}" in finish(words)
    assert losses(run) == losses(short_run) and records(run) == records(short_run)


def test_poisoned_batch_is_skipped_on_all_hosts_and_replayed(data, tmp_path):
    run = tmp_path / "run"
    words = faulty(command(data, run, *SHORT))
    env = environment() | {"TROUBLE": f"poison:{POISONED}"}
    assert f"the update of step {POISONED} was skipped (not finite)" in finish(under_launcher(words, 2), env)
    for process in (0, 1):
        (line,) = map(json.loads, (run / f"skipped{f'_{process}' * process}.jsonl").read_text().splitlines())
        assert (line["step"], line["reason"]) == (POISONED, "not finite")
        assert line["rows"] == records(run, process)[POISONED]
    rows = {row["step"]: row for row in read_metrics(run) if "skipped" in row}
    assert [rows[step]["skipped_in_a_row"] for step in (POISONED - 1, POISONED, POISONED + 1)] == [0, 1, 0]
    assert "loss" not in rows[POISONED] and np.isfinite(rows[12]["loss"]) and rows[12]["skipped"] == 1

    written = {path: path.stat().st_mtime_ns for path in run.rglob("*.jsonl")}
    output = finish(under_launcher([*words, f"--replay={POISONED}"], 2), env)
    assert f"step {POISONED} (update skipped): loss nan" in output
    assert "process 0: loss_weights of the batch has 1 values that are not finite" in output
    found = re.findall(r"process (\d): row (\d+): loss (\S+) over \S+ target tokens; (.*)", output)
    rows_of = {n: records(run, n)[POISONED] for n in (0, 1)}
    half = len(rows_of[0])
    expected = {
        (str(n), str(half * n + b), ", ".join(ids)) for n, rows in rows_of.items() for b, ids in enumerate(rows)
    }
    assert {(n, b, ids) for n, b, _, ids in found} == expected and len(found) == len(expected)
    assert [b for _, b, loss, _ in found if loss == "nan"] == ["0"]  # the poisoned one
    assert written == {path: path.stat().st_mtime_ns for path in run.rglob("*.jsonl")}


def test_broken_weight_stops_training_with_a_message(data, tmp_path):
    words = faulty(command(data, tmp_path / "run", *SHORT, "--config.guard.patience=3"))
    output = fail(words, environment() | {"TROUBLE": "weight:decoder"})
    assert "training stops after 3 skipped updates in a row" in output and "--replay=3" in output


def saved_steps(run: Path) -> set[int]:
    """The steps that are saved; there must be nothing else beside them."""
    names = {path.name for path in (run / "checkpoints").iterdir()} - {SAVED}
    assert all(name.isdecimal() for name in names), names
    return {int(name) for name in names}


@pytest.mark.slow
def test_damaged_checkpoint_falls_back_and_all_damaged_stops(data, tmp_path):
    """The newest damaged: training continues from the one before. All damaged: one sentence, and not step 0."""
    run = tmp_path / "run"
    words = command(data, run, "--config.optim.steps=6", "--config.data.eval_path=", "--config.log_every=1")
    finish(words)
    assert saved_steps(run) == {3, 6}
    data_file = max((run / "checkpoints" / "6" / "params").rglob("d/*"), key=lambda path: path.stat().st_size)
    data_file.write_bytes(bytes(data_file.stat().st_size))
    output = finish(words)
    assert "checkpoint 6 is damaged: its array params/" in output and "continuing from step 3" in output
    shutil.rmtree(run / "checkpoints" / "damaged-000006")
    assert saved_steps(run) == {3, 6}
    for step in (3, 6):
        (run / "checkpoints" / str(step) / "meta" / "metadata").write_text("{}")
    assert "holds no intact checkpoint: in 6, its file meta/metadata does not hold" in fail(words)


@pytest.mark.slow
def test_sigterm_while_compiling_validating_and_saving(data, tmp_path):
    """The run continues, with another guard, to the numbers of an undisturbed one; but not with another plan."""
    validated = (f"--config.data.validation_path={data}/test", "--config.validate_every=3")
    calm, run, log = tmp_path / "calm", tmp_path / "run", tmp_path / "log"
    words, end = command(data, run, *SHORT, *validated, "--config.checkpoint_every=100"), "--config.guard.spike=7"
    finish(command(data, calm, *SHORT, *validated))

    optimizing = environment() | {"XLA_FLAGS": ""}  # compiles for seconds
    output = terminate_when(words, log, lambda: compilations(log.read_text(), "step"), optimizing)
    assert "asked to stop, with nothing to save" in output and "compiled in" not in output

    output = fail(faulty(words), environment() | {"TROUBLE": "term:6", "SLOW": "1"}, code=75)
    assert "asked to stop: step 6 of 12 is saved" in output and "nothing to save" not in output
    assert saved_steps(run) == {6} and validations(run).keys() == {3} and losses(run).keys() == set(range(1, 7))

    output = finish([*words, end])
    assert "continuing from step 6" in output and "guard is {'spike': 7.0, " in output
    assert losses(run) == losses(calm) and records(run) == records(calm)
    assert validations(run) == validations(calm) and validations(calm).keys() == {3, 6, 9, 12}
    elapsed = [row["elapsed_s"] for row in read_metrics(run)]
    assert elapsed == sorted(elapsed) and elapsed[0] > 0
    meta = json.loads((run / "checkpoints" / "12" / "meta" / "metadata").read_text())
    assert meta["code"].startswith(phivision_jax.__version__)

    before = plan_hash(run)
    shutil.rmtree(run / "plan")
    output = fail([*words, end, "--config.data.seed=1"])
    assert f"12 of this run was trained with plan {before[:12]}, and its plan/ is now {plan_hash(run)[:12]}" in output


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_run_that_gives_up_has_saved_and_one_process_continues(data, tmp_path, processes):
    """A checkpoint is being written when the next update is one skipped too many."""
    run = tmp_path / "run"
    words = command(data, run, *SHORT, "--config.guard.patience=1")
    env = environment() | {"TROUBLE": "poison:5", "SLOW": "4" if processes > 1 else "0"}
    output = fail(under_launcher(faulty(words), processes), env)
    assert "training stops after 1 skipped updates in a row; the update of step 5 was skipped" in output
    assert saved_steps(run) == {4}
    skipped = list(run.glob("skipped*.jsonl"))
    assert len(skipped) == processes and all(len(path.read_text().splitlines()) == 1 for path in skipped)
    assert all(max(records(run, process)) > 4 for process in range(processes))

    assert "continuing from step 4" in finish(words)
    assert saved_steps(run) == {4, 8, 12} and losses(run).keys() == set(range(1, 13))
    for process in range(processes):  # logs of a process that no longer exists end with the checkpoint
        rows = {step: len(ids) for step, ids in records(run, process).items()}
        assert rows == {step: ROWS // processes if step <= 4 else ROWS for step in range(1, 5 if process else 13)}
    assert not any(path.read_text() for path in skipped)
