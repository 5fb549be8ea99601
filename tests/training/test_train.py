"""Training and scoring as commands: compilations, restarts, exports, mixtures, and mistakes."""

import functools
import json
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from phivision_jax.checkpoint.layout import CHECKPOINTS
from phivision_jax.cli.load_config import load_config
from phivision_jax.evaluation.results import load_results
from phivision_jax.training import setup
from phivision_jax.training.telemetry.metrics import read_metrics
from tests.support.batches import QUICK
from tests.support.commands import run_command
from tests.support.paths import ROOT
from tests.support.runs import (
    CHECKPOINT_EVERY,
    ROWS,
    arguments,
    command,
    compilations,
    environment,
    finish,
    losses,
    plan_hash,
)


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory) -> tuple[Path, str]:
    """A run to the end of its plan, and what it printed."""
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    return run, finish(command(data, run))


@pytest.fixture
def phivision(monkeypatch, capsys):
    """Run a subcommand in this process, on one device; returns (exit code, output)."""
    devices = jax.devices()
    monkeypatch.setattr(jax, "devices", lambda *_: devices[:1])
    monkeypatch.setenv("JAX_NUM_PROCESSES", "1")
    for module in ("step", "validation"):
        monkeypatch.setattr(f"phivision_jax.training.{module}.compiler_options", lambda mesh: QUICK)

    return functools.partial(run_command, capsys)


def test_train_compiles_once(undisturbed):
    """500 image sizes, the last partial step and every evaluation: steps and each shape of evaluation compile once."""
    run, output = undisturbed
    rows = len(np.load(run / "plan" / "row_offsets.npy")) - 1
    assert max(losses(run)) == -(-rows // ROWS) and rows % ROWS  # to the end of the plan, whose last step is not full
    assert not len(np.load(run / "plan" / "rejected.npy"))
    assert compilations(output, "step") == 1
    assert sum("eval/accuracy" in row for row in read_metrics(run)) > 1
    assert 1 <= compilations(output, "decode") <= 3  # a quarter, half and all of the slots
    assert 1 <= compilations(output, "admit") <= 4 and compilations(output, "encode") == 1
    assert {"eval/accuracy", "eval/examples"} <= read_metrics(run)[-1].keys()


def kill_at(data: Path, run: Path, step: int, log: Path) -> None:
    """Start the run, wait for the metrics of ``step``, SIGKILL."""
    with log.open("w") as output:
        process = subprocess.Popen(command(data, run), cwd=ROOT, env=environment(), stdout=output, stderr=output)
        while process.poll() is None and max(losses(run), default=0) < step:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, log.read_text()[-2000:]


@pytest.mark.parametrize("kills", [1, pytest.param(6, marks=pytest.mark.slow)])
def test_train_killed_resumes_to_equal_losses(undisturbed, data, tmp_path, kills):
    """Bit for bit, wherever the kills come."""
    run, expected = tmp_path / "killed", losses(undisturbed[0])
    rng = random.Random(time.time_ns())
    steps = sorted(rng.choices(range(2, len(expected) - 1), k=kills))
    for i, step in enumerate(steps):
        kill_at(data, run, max(step, max(losses(run), default=0) + 1), tmp_path / f"log{i}")
    output = finish(command(data, run))
    assert losses(run) == expected, f"killed at steps {steps}"
    assert compilations(output, "step") == 1
    continued = re.search(r"continuing from step (\d+)", output)
    # A checkpoint is certainly complete when the next one has begun.
    assert continued or steps[-1] <= 2 * CHECKPOINT_EVERY, output[-2000:]


def test_train_finished_run_changes_nothing(undisturbed, data, phivision):
    run, _ = undisturbed
    before = (run / "metrics.jsonl").read_text()
    code, output = phivision("train", *arguments(data, run))
    assert code == 0 and "continuing from step" in output
    assert (run / "metrics.jsonl").read_text() == before


def test_eval_scores_a_run(undisturbed, data, tmp_path, phivision):
    words = [f"--data={data}/test", f"--out={tmp_path}", "--slots=16", "--max-new-tokens=8", "--no-cache"]
    code, output = phivision("eval", str(undisturbed[0]), *words)
    assert code == 0, output
    (summary,) = json.loads((tmp_path / "report.json").read_text())["summaries"]
    _, results = load_results(tmp_path)
    assert summary["items"] == len(results) == 60
    accuracy = np.mean([result.answer == result.record["answer"] for result in results])
    assert summary["figures"] == pytest.approx({"score": 100 * accuracy, "nothink/general": 100 * accuracy})


def test_eval_takes_settings_from_a_configuration(undisturbed, data, phivision):
    words = ["--config=configs/tiny.py", f"--config.data.eval_path={data}/test", "--set", "max_new_tokens=2"]
    code, output = phivision("eval", str(undisturbed[0]), "--limit=8", "--no-cache", *words)
    assert code == 0 and "8" in output
    code, output = phivision("eval", str(undisturbed[0]))
    assert code == 1 and "nothing to score: give --benchmarks or --data" in output


def test_train_from_an_export_on_eight_devices_as_on_one(undisturbed, data, tmp_path, phivision):
    """An exported run starts two others, one of them sharded: equal losses, frozen modules unchanged."""
    hf, back = tmp_path / "hf", tmp_path / "back"
    assert phivision("convert", "to-hf", str(undisturbed[0]), str(hf))[0] == 0
    (hf / "remote_code.py").write_text("raise SystemExit('never run')")
    frozen = '--config.optim.lr_rules=(("decoder", 1.0), (".", 0.0))'
    more = [frozen, f"--config.init_from={hf}", "--config.optim.steps=3", "--config.data.batch_rows=8"]
    finish(command(data, tmp_path / "one", *more))
    assert "fsdp 8" in finish(command(data, tmp_path / "eight", *more), environment(devices=8))
    one, eight = losses(tmp_path / "one"), losses(tmp_path / "eight")
    assert len(one) == 3
    np.testing.assert_allclose(list(eight.values()), list(one.values()), atol=1e-5)
    assert phivision("convert", "to-hf", str(tmp_path / "eight"), str(back), "--like", str(hf))[0] == 0
    code, output = phivision("convert", "verify", str(hf), str(back))
    names = re.findall(r"different: (\S+),", output)
    assert code == 1 and names and not [name for name in names if "vision" in name or "projector" in name]
    assert (tmp_path / "eight" / "assets" / "remote_code.py").exists() and (back / "remote_code.py").exists()


def test_train_takes_a_plan_made_beforehand(data, tmp_path, phivision):
    """Two sources and a stage, planned on the command line; training takes the plan, and no other one."""
    mixture = tmp_path / "mix.toml"
    mixture.write_text(
        f'[[sources]]\npath = "{data}/train"\nweight = 3\n[[sources]]\npath = "{data}/test"\nweight = 1\n'
        '[[stages]]\nname = "one"\nexamples = 200\n[[stages]]\nname = "two"\n'
    )
    sizes = ["--length", "128", "--num-patches", "80", "--batch-rows", str(ROWS)]
    patches = ["--patch-size", "8", "--min-patches", "2", "--max-patches", "40"]
    _, printed = phivision(
        "data", "plan", str(mixture), "--out", str(tmp_path / "plan"), "--stage", "one", *sizes, *patches
    )
    assert re.search(r"source train +150 examples +75.00%.*requested 75.00% of examples", printed)
    words = [f"--config.data.path={mixture}", "--config.data.stage=one", f"--config.data.plan={tmp_path / 'plan'}"]
    words += ["--config.data.eval_path=", "--config.optim.steps=2"]
    code, output = phivision("train", *arguments(data, tmp_path / "run", *words))
    assert code == 0, output
    planned = json.loads((tmp_path / "plan" / "plan.json").read_text())["hash"]
    assert plan_hash(tmp_path / "run") == planned
    code, output = phivision("train", *arguments(data, tmp_path / "other", *words, "--config.data.num_patches=96"))
    assert code == 1 and "num_patches is 80 there, 96 here" in output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config.data.path=nowhere"], "nowhere"),
        (["--config.optim.steps=100000"], "optim.steps is 0 there, 100000 here"),
        (["--config.data.length=8"], "length is 128 there, 8 here"),
        (["--config.mesh.fsdp=3"], "mesh fsdp 3 needs 3 devices, but there are 1"),
        (["--config.data.seed=1"], "a plan for other settings"),
        (["--config.data.batch_rows=20"], "batch_rows is 10 there, 20 here"),
        (["--config.optim.learning_rate=1"], "optim.learning_rate is 0.0006 there, 1.0 here: this run was"),
        (["--set", "dtype=float23"], "--set dtype=float23: dtype must be one of 'float32', 'bfloat16'"),
        (["--config.optim.learnig_rate=1"], "no field 'optim.learnig_rate'; did you mean 'optim.learning_rate'?"),
        (["--config.optim.steps=some"], "--config.optim.steps=some: optim.steps must be an integer, not 'some'"),
        (["--config=configs/tinny.py"], "--config: configs/tinny.py does not exist; give"),
        (["--config=README.md"], "--config=README.md: SyntaxError"),
        (["--config=configs/tiny.py:nope"], "configs/tiny.py has the variants '' and 'long', not 'nope'"),
    ],
)
def test_train_mistake_is_one_sentence(undisturbed, data, phivision, words, message):
    code, output = phivision("train", *arguments(data, undisturbed[0], *words))
    (line,) = [line for line in output.splitlines() if line.startswith("phivision: ")]
    assert code == 1 and message in line


def test_train_without_a_model_is_one_sentence(tmp_path, phivision):
    code, output = phivision("train", "--config=configs/finetune.py", f"--run={tmp_path / 'run'}")
    assert code == 1 and output.startswith("phivision: init_from is empty: give --config.init_from=CHECKPOINT")


def test_train_unknown_flag(data, tmp_path, phivision):
    code, output = phivision("train", *arguments(data, tmp_path / "run", "--rnu=x"))
    assert code == 2 and "--rnu" in output


def test_train_longer_than_the_plan_is_one_sentence(data, tmp_path, phivision):
    code, output = phivision("train", *arguments(data, tmp_path / "run", "--config.optim.steps=100000"))
    assert code == 1 and "optim.steps is 100,000, but data.epochs=1 gives 15; raise data.epochs" in output
    more = ["--config.data.epochs=2", "--config.optim.steps=100000"]
    code, output = phivision("train", *arguments(data, tmp_path / "run", *more))
    assert code == 1 and "data.epochs=2 gives" in output


def test_train_help_explains_the_configuration(phivision):
    code, output = phivision("train", "--config=configs/finetune.py", "--set", "seed=7", "--help")
    assert code == 0 and re.search(r"--config\.seed INT[^-]*\(default: 7\)", output)
    assert "Seed for example order and the validation split." in output


def test_train_replays_a_step(data, short_run, phivision):
    """A step repeated has the numbers of the run; one that does not exist is refused; the run stays as it is."""
    files = {path: path.stat().st_mtime_ns for path in short_run.rglob("*") if CHECKPOINTS in path.parts}
    words = [f"--run={short_run}"]
    code, output = phivision("train", *words, "--replay=7")
    assert code == 0 and f"step 7 (update accepted): loss {losses(short_run)[7]:.6g}," in output, output
    for step in (0, 13):
        code, output = phivision("train", *words, f"--replay={step}")
        assert code == 1 and "steps are 1 to 12" in output
    assert files == {path: path.stat().st_mtime_ns for path in short_run.rglob("*") if CHECKPOINTS in path.parts}


def test_train_saves_the_due_checkpoint_before_an_evaluation_that_fails(data, tmp_path, phivision, monkeypatch):
    """What the run has printed and its directory also explain how it was started."""

    def fail(*_):
        raise ValueError("this question has no answer")

    monkeypatch.setattr(setup, "make_validator", lambda prepared: fail)
    run = tmp_path / "run"
    words = arguments(data, run, "--config.optim.steps=2", "--config.checkpoint_every=0", "--config.data.eval_path=")
    words += ["--config.data.validation_share=0.1", "--config.optim.lr_rules=(('projector', 1.0), ('.', 0.0))"]
    code, output = phivision("train", *words)
    assert code == 1 and output.splitlines()[-1] == "phivision: this question has no answer"
    assert (run / CHECKPOINTS / "2").is_dir() and losses(run).keys() == {1, 2}

    pattern = r"(\S+) of (\S+) parameters train on one device; (\d+) of 500 records are held out for validation"
    trained, total, held_out = (int(n.replace(",", "")) for n in re.search(f"^{pattern}$", output, re.M).groups())
    assert trained == 16 * 16 + 16 + 16 * 16 + 16 and trained < total and 20 < held_out < 90
    assert re.search(r"^compiling the step …\ncompiled in \S+ s$", output, re.M)

    kept = json.loads((run / "config.json").read_text())
    assert kept["optim"]["lr_rules"] == [["projector", 1.0], [".", 0.0]] and kept["remat"] == "none"
    assert (run / "command.txt").read_text() == shlex.join(sys.argv) + "\n"
    flags = [word.removeprefix("--") for word in words if word.startswith("--config.")]
    assert load_config(f"{run}/config.json") == load_config("configs/tiny.py", flags)
