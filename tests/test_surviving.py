"""Trainings that something happens to: told to stop, poisoned batches, broken weights. Real processes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from phivision_jax.training.metrics import read_metrics
from tests.test_train import ROOT, command, data, environment, finish, losses  # noqa: F401  (data is a fixture)

SHORT = ("--config.optim.steps=12", "--config.data.eval_path=", "--config.checkpoint_every=4")
POISONED = 6


def troubled(words: list[str]) -> list[str]:
    return [words[0], "tests/training/troubled_train.py", *words[2:]]


def launched(words: list[str], processes: int) -> list[str]:
    return [sys.executable, "-m", "phivision_jax.launch", f"--processes={processes}", "--", *words]


def records(run: Path, process: int = 0) -> dict[int, list]:
    lines = map(json.loads, (run / f"records_{process}.jsonl").read_text().splitlines())
    return {line["step"]: line["ids"] for line in lines}


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory) -> Path:  # noqa: F811
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    finish(command(data, run, *SHORT))
    return run


def test_told_to_stop_it_saves_and_goes_on_to_the_same_numbers(undisturbed, data, tmp_path):  # noqa: F811
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


def test_a_poisoned_batch_is_skipped_on_all_hosts_named_and_replayed(data, tmp_path):  # noqa: F811
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
    again = subprocess.run([*words, f"--replay={POISONED}"], cwd=ROOT, env=trouble, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr[-3000:]
    assert f"step {POISONED} (not taken): loss nan" in again.stdout
    assert "loss_weights of the batch has 1 values that are not finite" in again.stdout
    ids = [", ".join(row) for process in (0, 1) for row in records(run, process)[POISONED]]
    assert all(row in again.stdout for row in ids)
    assert written == {path: path.stat().st_mtime_ns for path in run.rglob("*.jsonl")}


def test_a_sound_step_is_replayed_to_the_number(undisturbed, data):  # noqa: F811
    said = finish([*command(data, undisturbed, *SHORT), "--replay=7"])
    assert f"step 7 (taken): loss {losses(undisturbed)[7]:.6g}," in said


def test_a_broken_weight_stops_the_training_with_a_sentence(data, tmp_path):  # noqa: F811
    words = troubled(command(data, tmp_path / "broken", *SHORT, "--config.guard.patience=3"))
    trouble = os.environ | environment() | {"TROUBLE": "weight:decoder"}
    done = subprocess.run(words, cwd=ROOT, env=trouble, capture_output=True, text=True)
    assert done.returncode == 1
    assert "3 steps in a row were not taken, and training stops here" in done.stderr and "--replay=3" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("step", [0, 13])
def test_only_steps_of_the_run_are_replayed(undisturbed, data, step):  # noqa: F811
    words = [*command(data, undisturbed, *SHORT), f"--replay={step}"]
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode != 0 and re.search(r"steps are 1 to 12|not a positive integer", done.stderr)
    assert "Traceback" not in done.stderr
