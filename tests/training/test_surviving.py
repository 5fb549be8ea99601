"""Trainings that something happens to: told to stop, poisoned batches, broken weights. Real processes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import phivision_jax
from phivision_jax.checkpoint.layout import SEALED
from phivision_jax.checkpoint.manifest import MANIFEST
from phivision_jax.training.telemetry.metrics import read_metrics
from tests.training.test_train import ROOT, ROWS, command, compilations, environment, finish, losses

SHORT = ("--config.optim.steps=12", "--config.data.eval_path=", "--config.checkpoint_every=4")
POISONED = 6


def troubled(words: list[str]) -> list[str]:
    return [words[0], "tests/support/troubled_train.py", *words[2:]]


def launched(words: list[str], processes: int) -> list[str]:
    return [sys.executable, "-m", "phivision_jax.distributed.launch", f"--processes={processes}", "--", *words]


def records(run: Path, process: int = 0) -> dict[int, list]:
    lines = map(json.loads, (run / f"records_{process}.jsonl").read_text().splitlines())
    return {line["step"]: line["ids"] for line in lines}


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    finish(command(data, run, *SHORT))
    return run


def test_told_to_stop_it_saves_and_goes_on_to_the_same_numbers(undisturbed, data, tmp_path):
    run, log = tmp_path / "told", tmp_path / "log"
    words = command(data, run, *SHORT)
    with log.open("w") as output:
        process = subprocess.Popen(words, cwd=ROOT, env=environment(), stdout=output, stderr=output)
        while process.poll() is None and max(losses(run), default=0) < 5:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 75, log.read_text()[-2000:]
    told = re.search(r"told to stop: step (\d+) of 12 is saved", log.read_text())
    assert told and (run / "checkpoints" / told[1]).is_dir()
    assert f"continuing from step {told[1]}" in finish(words)
    assert losses(run) == losses(undisturbed) and records(run) == records(undisturbed)


def test_a_poisoned_batch_is_skipped_on_all_hosts_named_and_replayed(data, tmp_path):
    run = tmp_path / "poisoned"
    words = troubled(command(data, run, *SHORT))
    trouble = environment() | {"TROUBLE": f"poison:{POISONED}"}
    done = subprocess.run(launched(words, 2), cwd=ROOT, env=trouble, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"step {POISONED} was not taken" in done.stdout + done.stderr
    for process in (0, 1):
        (line,) = map(json.loads, (run / f"skipped{f'_{process}' * process}.jsonl").read_text().splitlines())
        assert (line["step"], line["reason"]) == (POISONED, "not finite")
        assert line["rows"] == records(run, process)[POISONED]
    rows = {row["step"]: row for row in read_metrics(run) if "skipped" in row}
    assert [rows[step]["skipped_in_a_row"] for step in (POISONED - 1, POISONED, POISONED + 1)] == [0, 1, 0]
    assert "loss" not in rows[POISONED] and np.isfinite(rows[12]["loss"]) and rows[12]["skipped"] == 1

    written = {path: path.stat().st_mtime_ns for path in run.rglob("*.jsonl")}
    words = launched([*words, f"--replay={POISONED}"], 2)
    again = subprocess.run(words, cwd=ROOT, env=trouble, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr[-3000:]
    assert f"step {POISONED} (not taken): loss nan" in again.stdout
    assert "process 0: loss_weights of the batch has 1 values that are not finite" in again.stdout
    told = re.findall(r"process (\d): row (\d+): loss (\S+) over \S+ target tokens; (.*)", again.stdout)
    rows_of = {n: records(run, n)[POISONED] for n in (0, 1)}
    half = len(rows_of[0])
    want = {(str(n), str(half * n + b), ", ".join(ids)) for n, rows in rows_of.items() for b, ids in enumerate(rows)}
    assert {(n, b, ids) for n, b, _, ids in told} == want and len(told) == len(want)
    assert [b for _, b, loss, _ in told if loss == "nan"] == ["0"]  # the poisoned one
    assert written == {path: path.stat().st_mtime_ns for path in run.rglob("*.jsonl")}


def test_a_sound_step_is_replayed_to_the_number(undisturbed, data):
    said = finish([*command(data, undisturbed, *SHORT), "--replay=7"])
    assert f"step 7 (taken): loss {losses(undisturbed)[7]:.6g}," in said


def test_a_broken_weight_stops_the_training_with_a_sentence(data, tmp_path):
    words = troubled(command(data, tmp_path / "broken", *SHORT, "--config.guard.patience=3"))
    trouble = os.environ | environment() | {"TROUBLE": "weight:decoder"}
    done = subprocess.run(words, cwd=ROOT, env=trouble, capture_output=True, text=True)
    assert done.returncode == 1
    assert "3 steps in a row were not taken, and training stops here" in done.stderr and "--replay=3" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("step", [0, 13])
def test_only_steps_of_the_run_are_replayed(undisturbed, data, step):
    words = [*command(data, undisturbed, *SHORT), f"--replay={step}"]
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode != 0 and re.search(r"steps are 1 to 12|not a positive integer", done.stderr)
    assert "Traceback" not in done.stderr


def whole(run: Path) -> set[int]:
    """The steps that are saved and sealed; nothing else may lie beside them."""
    left = {path.name for path in (run / "checkpoints").iterdir()} - {SEALED}
    assert all((run / "checkpoints" / name / MANIFEST).exists() for name in left), left
    return {int(name) for name in left}


@pytest.mark.slow
def test_told_to_stop_while_it_compiles_at_a_due_validation_and_while_it_saves(data, tmp_path):
    """And goes on, guarded otherwise, to the numbers of a run that was left alone; but not with another plan."""
    validated = (f"--config.data.validation_path={data}/test", "--config.validate_every=3")
    calm, run, log = tmp_path / "calm", tmp_path / "run", tmp_path / "log"
    words, end = command(data, run, *SHORT, *validated, "--config.checkpoint_every=100"), "--config.guard.spike=7"
    finish(command(data, calm, *SHORT, *validated))

    slow = environment() | {"XLA_FLAGS": ""}  # with everything that LLVM can do, it compiles for seconds
    with log.open("w") as output:
        process = subprocess.Popen(words, cwd=ROOT, env=slow, stdout=output, stderr=output)
        while process.poll() is None and not compilations(log.read_text(), "step"):
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75, log.read_text()[-2000:]
    assert "told to stop, with nothing to save" in log.read_text() and "; compiled in" not in log.read_text()

    trouble = environment() | {"TROUBLE": "told:6", "SLOW": "1"}
    done = subprocess.run(troubled(words), cwd=ROOT, env=trouble, capture_output=True, text=True)
    assert done.returncode == 75, done.stderr[-3000:]
    assert "told to stop: step 6 of 12 is saved" in done.stdout and "nothing to save" not in done.stderr
    assert whole(run) == {6} and validations(run).keys() == {3} and losses(run).keys() == set(range(1, 7))

    said = finish([*words, end])
    assert "continuing from step 6" in said and "guard is {'spike': 7.0, " in said
    assert losses(run) == losses(calm) and records(run) == records(calm)
    assert validations(run) == validations(calm) and validations(calm).keys() == {3, 6, 9, 12}
    elapsed = [row["elapsed_s"] for row in read_metrics(run)]
    assert elapsed == sorted(elapsed) and elapsed[0] > 0
    meta = json.loads((run / "checkpoints" / "12" / "meta" / "metadata").read_text())
    assert meta["code"].startswith(phivision_jax.__version__)

    before = json.loads((run / "plan" / "plan.json").read_text())["hash"]
    shutil.rmtree(run / "plan")
    refused = subprocess.run(
        [*words, end, "--config.data.seed=1"], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    now = json.loads((run / "plan" / "plan.json").read_text())["hash"]
    assert f"12 was trained with plan {before[:12]}, and its plan/ is now {now[:12]}: bring back" in refused.stderr


def validations(run: Path) -> dict[int, float]:
    return {row["step"]: row["validation/loss"] for row in read_metrics(run) if "validation/loss" in row}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_training_that_gives_up_has_saved_and_one_process_goes_on(data, tmp_path, processes):
    """A checkpoint is being written when the poisoned step after it is one too many."""
    run = tmp_path / "run"
    words = command(data, run, *SHORT, "--config.guard.patience=1")
    trouble = environment() | {"TROUBLE": "poison:5", "SLOW": "4" if processes > 1 else "0"}
    done = subprocess.run(launched(troubled(words), processes), cwd=ROOT, env=trouble, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr[-3000:]
    assert "1 steps in a row were not taken, and training stops here; step 5 was not taken" in done.stderr
    assert whole(run) == {4}
    skipped = list(run.glob("skipped*.jsonl"))
    assert len(skipped) == processes and all(len(path.read_text().splitlines()) == 1 for path in skipped)
    assert all(max(records(run, process)) > 4 for process in range(processes))

    assert "continuing from step 4" in finish(words)
    assert whole(run) == {4, 8, 12} and losses(run).keys() == set(range(1, 13))
    for process in range(processes):  # those of a process that is no more end with the checkpoint
        rows = {step: len(ids) for step, ids in records(run, process).items()}
        assert rows == {step: ROWS // processes if step <= 4 else ROWS for step in range(1, 5 if process else 13)}
    assert not any(path.read_text() for path in skipped)
