"""A training whose run is in a bucket: killed, continued elsewhere, damaged, cut off. Real processes, a real server."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.damage import flip
from phivision_jax.checkpoint.layout import CHECKPOINTS
from phivision_jax.cli import goodput
from phivision_jax.distributed import heartbeat
from phivision_jax.io import storage
from phivision_jax.training.telemetry.metrics import read_metrics
from tests.support.bucket_emulator import Emulator
from tests.training.test_train import ROOT, command, data, environment, finish, losses  # noqa: F401  (data is a fixture)

STEPS, EVERY = 12, 3
SHORT = (f"--config.optim.steps={STEPS}", "--config.data.eval_path=", f"--config.checkpoint_every={EVERY}")


def records(run: Path, process: int = 0) -> dict[int, list]:
    lines = map(json.loads, (run / f"records_{process}.jsonl").read_text().splitlines())
    return {line["step"]: line["ids"] for line in lines}


def objects(run: str, below: str = "") -> dict[str, int]:
    return storage.files(storage.location(run) / below)


def steps(run: str) -> set[int]:
    return {int(name.split("/")[0]) for name in objects(run, CHECKPOINTS) if name[0].isdigit()}


def fetched(run: str, to: Path) -> Path:
    """The run's small files, as they are in the bucket."""
    names = [name for name in objects(run) if not name.startswith((f"{CHECKPOINTS}/", "compilation_cache/"))]
    storage.download(storage.location(run), to, names)
    return to


def on(machine: Path) -> dict[str, str]:
    """The environment of a process on a machine of its own, as far as mirrors go."""
    return environment() | {"PHIVISION_SCRATCH": str(machine)}


def reached(machine: Path) -> int:
    return max((step for mirror in machine.glob("*/0/*") for step in losses(mirror)), default=0)


def run_until(words: list[str], environment: dict[str, str], condition, log: Path) -> subprocess.Popen:
    with log.open("w") as output:
        process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=output, stderr=output)
    while not condition():
        assert process.poll() is None, log.read_text()[-3000:]
        time.sleep(0.01)
    return process


def kill_at(words: list[str], machine: Path, condition, log: Path) -> None:
    process = run_until(words, on(machine), condition, log)
    process.kill()
    assert process.wait() == -signal.SIGKILL, log.read_text()[-2000:]


def finish_on(machine: Path, words: list[str]) -> str:
    done = subprocess.run(words, cwd=ROOT, env=on(machine), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory) -> Path:  # noqa: F811
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    finish(command(data, run, *SHORT))
    return run


def assert_as(undisturbed: Path, run: str, folder: Path, processes: int = 1) -> None:
    """What is in the bucket is what an undisturbed training has on its disk."""
    fetched(run, folder)
    assert losses(folder) == losses(undisturbed)
    assert [row["step"] for row in read_metrics(folder)] == list(range(1, STEPS + 1))
    for process in range(processes):
        assert records(folder, process) == records(undisturbed, process)
    assert (folder / "plan" / "plan.json").read_bytes() == (undisturbed / "plan" / "plan.json").read_bytes()
    assert steps(run) == {int(path.name) for path in (undisturbed / CHECKPOINTS).glob("[0-9]*")}


def test_killed_and_continued_on_another_machine(undisturbed, data, bucket, tmp_path, capsys):  # noqa: F811
    words = command(data, bucket, *SHORT)
    kill_at(words, tmp_path / "one", lambda: reached(tmp_path / "one") >= 8, tmp_path / "log")
    said = finish_on(tmp_path / "two", words)
    assert re.search("continuing from step [36]", said), said
    assert_as(undisturbed, bucket, tmp_path / "run")
    assert objects(bucket, "heartbeat") and objects(bucket, "tensorboard")
    goodput.goodput((bucket,))
    assert re.search(rf"{bucket}: [12] starts?, at step 12, ", capsys.readouterr().out)


@pytest.mark.slow
def test_killed_while_a_checkpoint_is_written(undisturbed, data, bucket, tmp_path):  # noqa: F811
    """At its first object; what is there then is no step, and the next start is not in its way."""
    words = command(data, bucket, *SHORT)
    kill_at(words, tmp_path / "one", lambda: objects(bucket, f"{CHECKPOINTS}/6"), tmp_path / "log")
    assert not (storage.location(bucket) / CHECKPOINTS / "6" / "commit_success.txt").exists()
    assert "continuing from step 3" in finish_on(tmp_path / "two", words)
    assert_as(undisturbed, bucket, tmp_path / "run")


@pytest.mark.slow
def test_a_flipped_byte_and_a_replay(undisturbed, data, bucket, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    words = command(data, bucket, *SHORT)
    finish_on(tmp_path / "one", words)
    assert_as(undisturbed, bucket, tmp_path / "run")
    newest = storage.location(bucket) / CHECKPOINTS / str(STEPS)
    listed = storage.files(newest)
    largest = max((name for name in listed if "/d/" in name), key=lambda name: listed[name])
    flip(newest / largest, random.Random(0))
    said = finish_on(tmp_path / "two", words)
    assert f"checkpoint {STEPS} is damaged: its file {largest} does not hold the bytes" in said
    assert f"continuing from step {STEPS - EVERY}" in said
    before = objects(bucket)
    assert [name for name in before if name.startswith("compilation_cache/jit_step")]
    said = finish_on(tmp_path / "two", [*words, "--replay=11"])
    assert f"step 11 (taken): loss {losses(undisturbed)[11]:.6g}," in said
    after = objects(bucket)
    assert {n: b for n, b in after.items() if not n.startswith("compilation_cache/")} == {
        n: b for n, b in before.items() if not n.startswith("compilation_cache/")
    }
    assert f"damaged-0000{STEPS}" in {name.split("/")[1] for name in after if name.startswith(CHECKPOINTS)}


@pytest.mark.slow
def test_two_processes_on_one_run(data, bucket, tmp_path):  # noqa: F811
    """One is killed; the launcher, which finds their heartbeats in the mirrors, starts both again."""
    launch = [sys.executable, "-m", "phivision_jax.distributed.launch", "--processes=2", "--restarts=1", "--"]
    calm = tmp_path / "calm"
    finish([*launch, *command(data, calm, *SHORT)])
    machine, log = tmp_path / "machine", tmp_path / "log"
    process = run_until(
        [*launch, *command(data, bucket, *SHORT)], on(machine), lambda: reached(machine) >= 7, log
    )  # fmt: skip
    (beat,) = (beat for mirror in machine.glob("*/1/*") for beat in heartbeat.read(mirror))
    os.kill(beat["pid"], signal.SIGKILL)
    assert process.wait(300) == 0, log.read_text()[-3000:]
    said = log.read_text()
    assert re.search(r"process 1 \(pid \d+\) was killed by SIGKILL; its last heartbeat, \d+ s ago: ", said)
    assert "continuing from step" in said
    assert_as(calm, bucket, tmp_path / "run", processes=2)


@pytest.mark.slow
def test_no_such_bucket_is_a_sentence(data, bucket, tmp_path):  # noqa: F811
    began = time.monotonic()
    done = subprocess.run(
        command(data, "gs://nobody-s/run", *SHORT), cwd=ROOT, env=on(tmp_path), capture_output=True, text=True
    )
    assert done.returncode == 1 and time.monotonic() - began < 60
    assert "Traceback" not in done.stderr
    assert "train.py: gs://nobody-s/run: there is no bucket nobody-s; gcloud storage buckets create" in done.stderr


@pytest.mark.slow
def test_a_server_that_goes_away_while_training(data, tmp_path):  # noqa: F811
    """Said once while training goes on, and the end at the next checkpoint."""
    with Emulator() as emulator:
        words = command(data, "gs://bucket/run", "--config.data.eval_path=", "--config.checkpoint_every=30")
        words[1] = "tests/support/impatient_train.py"
        words += ["--config.optim.steps=45", "--config.data.epochs=4"]
        machine = tmp_path / "machine"
        environment = on(machine) | emulator.environment | {"IMPATIENT": "1"}
        process = run_until(words, environment, lambda: reached(machine) >= 5, tmp_path / "log")
        emulator.stop()
        began = time.monotonic()
        assert process.wait(300) == 1
        assert time.monotonic() - began < 150
    said = (tmp_path / "log").read_text()
    assert said.count("training goes on, and its log is sent") == 1, said[-3000:]
    assert re.search(
        r"train.py: checkpoint 30 could not be written to gs://bucket/run/checkpoints: .*does not answer", said
    ), said[-3000:]
    assert "Traceback" not in said
