"""A run in a bucket: killed, continued elsewhere, damaged, cut off. Real processes, a real server."""

import os
import random
import re
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from phivision_jax.checkpoint.layout import CHECKPOINTS
from phivision_jax.cli import goodput
from phivision_jax.distributed import heartbeat
from phivision_jax.io import storage
from phivision_jax.training.telemetry.metrics import read_metrics
from tests.support.bucket_emulator import Emulator
from tests.support.damage import flip
from tests.support.launched import under_launcher
from tests.support.paths import ROOT
from tests.support.runs import command, environment, fail, finish, losses, records

STEPS, EVERY = 12, 3
SHORT = (f"--config.optim.steps={STEPS}", "--config.data.eval_path=", f"--config.checkpoint_every={EVERY}")


def objects(run: str, below: str = "") -> dict[str, int]:
    return storage.files(storage.location(run) / below)


def steps(run: str) -> set[int]:
    return {int(name.split("/")[0]) for name in objects(run, CHECKPOINTS) if name[0].isdigit()}


def fetch(run: str, to: Path) -> Path:
    """Download the run's small files from the bucket."""
    names = [name for name in objects(run) if not name.startswith((f"{CHECKPOINTS}/", "compilation_cache/"))]
    storage.download(storage.location(run), to, names)
    return to


def on(machine: Path) -> dict[str, str]:
    """The environment of a process on a machine of its own, as far as local copies matter."""
    return environment() | {"PHIVISION_SCRATCH": str(machine)}


def values(item: storage.Location) -> list[bytes] | None:
    """All bytes of the arrays in a part of a checkpoint, as Orbax reads them; None where it cannot."""
    try:
        return [np.asarray(array).tobytes() for array in jax.tree.leaves(ocp.PyTreeCheckpointer().restore(item))]
    except ValueError:
        return None


def reached(machine: Path) -> int:
    return max((step for copy in machine.glob("*/0-*/*") for step in losses(copy)), default=0)


def run_until(words: list[str], env: dict[str, str], condition, log: Path) -> subprocess.Popen:
    with log.open("w") as output:
        process = subprocess.Popen(words, cwd=ROOT, env=env, stdout=output, stderr=output)
    while not condition():
        assert process.poll() is None, log.read_text()[-3000:]
        time.sleep(0.01)
    return process


def kill_when(words: list[str], machine: Path, condition, log: Path) -> None:
    process = run_until(words, on(machine), condition, log)
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    finish(command(data, run, *SHORT))
    return run


def assert_equal(undisturbed: Path, run: str, folder: Path, processes: int = 1) -> None:
    """The bucket has what an undisturbed run has on its disk."""
    fetch(run, folder)
    assert losses(folder) == losses(undisturbed)
    assert [row["step"] for row in read_metrics(folder)] == list(range(1, STEPS + 1))
    for process in range(processes):
        assert records(folder, process) == records(undisturbed, process)
    assert (folder / "plan" / "plan.json").read_bytes() == (undisturbed / "plan" / "plan.json").read_bytes()
    assert steps(run) == {int(path.name) for path in (undisturbed / CHECKPOINTS).glob("[0-9]*")}


def test_killed_run_continues_on_another_machine(undisturbed, data, bucket, tmp_path, capsys):
    words = command(data, bucket, *SHORT)
    kill_when(words, tmp_path / "one", lambda: reached(tmp_path / "one") >= 8, tmp_path / "log")
    output = finish(words, on(tmp_path / "two"))
    assert re.search("continuing from step [36]", output), output
    assert_equal(undisturbed, bucket, tmp_path / "run")
    assert objects(bucket, "heartbeat") and objects(bucket, "tensorboard")
    goodput.goodput((bucket,))
    assert re.search(rf"{bucket}: [12] starts?, at step 12, ", capsys.readouterr().out)


@pytest.mark.slow
def test_killed_while_writing_a_checkpoint(undisturbed, data, bucket, tmp_path):
    """At its first object; the incomplete step is ignored by the next start."""
    words = command(data, bucket, *SHORT)
    kill_when(words, tmp_path / "one", lambda: objects(bucket, f"{CHECKPOINTS}/6"), tmp_path / "log")
    assert not (storage.location(bucket) / CHECKPOINTS / "6" / "commit_success.txt").exists()
    assert "continuing from step 3" in finish(words, on(tmp_path / "two"))
    assert_equal(undisturbed, bucket, tmp_path / "run")


@pytest.mark.slow
def test_flipped_byte_and_replay(undisturbed, data, bucket, tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    words = command(data, bucket, *SHORT)
    finish(words, on(tmp_path / "one"))
    assert_equal(undisturbed, bucket, tmp_path / "run")
    newest = storage.location(bucket) / CHECKPOINTS / str(STEPS)
    listed, rng = storage.files(newest), random.Random(0)
    largest = max((name for name in listed if "/d/" in name), key=lambda name: listed[name])
    saved, content = values(newest / largest.split("/")[0]), (newest / largest).read_bytes()
    for _ in range(100):  # a file also holds bytes that mean nothing, and some whose change makes it unreadable
        flip(newest / largest, rng)
        if values(newest / largest.split("/")[0]) not in (saved, None):
            break
        (newest / largest).write_bytes(content)
    assert (newest / largest).read_bytes() != content
    output = finish(words, on(tmp_path / "two"))
    assert f"checkpoint {STEPS} is damaged: its array " in output
    assert f"continuing from step {STEPS - EVERY}" in output
    before = objects(bucket)
    assert [name for name in before if name.startswith("compilation_cache/jit_step")]
    output = finish([*words, "--replay=11"], on(tmp_path / "two"))
    assert f"step 11 (update accepted): loss {losses(undisturbed)[11]:.6g}," in output
    after = objects(bucket)
    assert {n: b for n, b in after.items() if not n.startswith("compilation_cache/")} == {
        n: b for n, b in before.items() if not n.startswith("compilation_cache/")
    }
    assert f"damaged-0000{STEPS}" in {name.split("/")[1] for name in after if name.startswith(CHECKPOINTS)}


@pytest.mark.slow
def test_two_processes(data, bucket, tmp_path):
    """One is killed; the launcher, which finds their heartbeats in the local copies, restarts both."""
    calm = tmp_path / "calm"
    finish(under_launcher(command(data, calm, *SHORT), 2, restarts=1))
    machine, log = tmp_path / "machine", tmp_path / "log"
    words = under_launcher(command(data, bucket, *SHORT), 2, restarts=1)
    process = run_until(words, on(machine), lambda: reached(machine) >= 7, log)
    (beat,) = (beat for copy in machine.glob("*/1-*/*") for beat in heartbeat.read(copy))
    os.kill(beat["pid"], 9)
    assert process.wait(300) == 0, log.read_text()[-3000:]
    output = log.read_text()
    assert re.search(r"process 1 \(pid \d+\) was killed by SIGKILL; its last heartbeat, \d+ s ago: ", output)
    assert "continuing from step" in output
    assert_equal(calm, bucket, tmp_path / "run", processes=2)


@pytest.mark.slow
def test_missing_bucket_is_a_message(data, bucket, tmp_path):
    began = time.monotonic()
    output = fail(command(data, "gs://nobody-s/run", *SHORT), on(tmp_path))
    assert time.monotonic() - began < 60
    assert "phivision: gs://nobody-s/run: there is no bucket nobody-s; create it with gcloud storage" in output


@pytest.mark.slow
def test_server_that_goes_away_while_training(data, tmp_path):
    """Reported once while training continues, and the end at the next checkpoint.

    The end comes after few requests of the main thread that fail, however long each takes on this machine.
    """
    with Emulator() as emulator:
        words = command(data, "gs://bucket/run", "--config.data.eval_path=", "--config.checkpoint_every=30")
        words[1] = "tests/support/trouble.py"
        words += ["--config.optim.steps=45", "--config.data.epochs=4"]
        machine = tmp_path / "machine"
        env = on(machine) | emulator.environment | {"IMPATIENT": "1"}
        process = run_until(words, env, lambda: reached(machine) >= 5, tmp_path / "log")
        emulator.stop()
        assert process.wait(1800) == 1
    output = (tmp_path / "log").read_text()
    assert 1 <= output.count("a request of the main thread failed") <= 3, output[-3000:]
    assert output.count("training continues, and its logs are sent") == 1, output[-3000:]
    assert re.search(
        r"phivision: checkpoint 30 could not be written to gs://bucket/run/checkpoints: .*does not answer", output
    ), output[-3000:]
    assert "Traceback" not in output
