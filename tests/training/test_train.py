"""train.py and eval.py as a user runs them: real processes, killed and started again."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from phivision_jax.config import DecoderConfig, ModelConfig
from phivision_jax.data.records import Record
from phivision_jax.data.store.importing import write_dataset
from phivision_jax.processor import Processor
from phivision_jax.training.telemetry.metrics import read_metrics
from tests.support.paths import ROOT

SIZES, ROWS, CHECKPOINT_EVERY = 500, 10, 3
SMALL = [
    "--config.model.vision.hidden_size=16",
    "--config.model.vision.intermediate_size=16",
    "--config.model.vision.num_layers=2",
    "--config.model.vision.num_heads=2",
    "--config.model.vision.patch_size=8",
    "--config.model.decoder.hidden_size=16",
    "--config.model.decoder.intermediate_size=16",
    "--config.model.decoder.num_layers=1",
    "--config.model.decoder.num_heads=2",
    "--config.model.decoder.num_kv_heads=1",
    "--config.model.min_patches=2",
    "--config.model.max_patches=40",
    "--config.data.length=128",
    "--config.data.num_patches=80",
    f"--config.data.batch_rows={ROWS}",
    "--config.data.epochs=1",
    "--config.optim.steps=0",
    "--config.optim.warmup_steps=2",
    "--config.log_every=1",
    f"--config.checkpoint_every={CHECKPOINT_EVERY}",
    "--config.eval_every=10",
    "--config.eval_examples=20",
    "--config.eval_batch=8",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """500 pictures of 500 different sizes, each with its question."""
    folder = tmp_path_factory.mktemp("data")
    decoder = DecoderConfig(vocab_size=512, bos_token_id=507, eos_token_id=508, pad_token_id=509)
    rng = random.Random(0)
    sizes = rng.sample([(w, h) for w in range(1, 90) for h in range(1, 90)], SIZES)

    def record(i: int, size: tuple[int, int]) -> Record:
        image = Image.new("RGB", size, (i % 256, i // 2 % 256, 7))
        path = folder / f"{i}.png"
        image.save(path)
        return Record(
            id=str(i),
            source="made",
            images=(path.read_bytes(),),
            messages=(
                {"role": "user", "content": "<image>\nhow many?"},
                {"role": "assistant", "content": str(i % 7)},
            ),
            mode="nothink",
            task="general",
            metadata={},
        )

    records = [record(i, size) for i, size in enumerate(sizes)]
    processor = Processor.small(ModelConfig(decoder=decoder))
    write_dataset(folder / "train", records, processor, progress=False)
    write_dataset(folder / "test", records[:60], processor, progress=False)
    return folder


def command(data: Path, run: Path, *more: str) -> list[str]:
    where = [f"--run={run}", f"--config.data.path={data}/train", f"--config.data.eval_path={data}/test"]
    return [sys.executable, "train.py", "--config=configs/tiny.py", *SMALL, *where, *more]


def environment() -> dict[str, str]:
    """One device, and every compilation told; LLVM does not optimise, which costs more than these models compute."""
    quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    return os.environ | {"JAX_LOG_COMPILES": "1", "XLA_FLAGS": quick, "JAX_PLATFORMS": "cpu"}


def kill_at(data: Path, run: Path, step: int, log: Path) -> None:
    """Start the run, wait for the metrics of ``step``, SIGKILL."""
    with log.open("w") as output:
        process = subprocess.Popen(command(data, run), cwd=ROOT, env=environment(), stdout=output, stderr=output)
        while process.poll() is None and max(losses(run), default=0) < step:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, log.read_text()[-2000:]


def finish(words: list[str]) -> str:
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def compilations(output: str, function: str) -> int:
    return len(re.findall(rf"Compiling jit\({function}\) ", output))


def losses(run: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_metrics(run) if "loss" in row}


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory) -> tuple[Path, str]:
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    return run, finish(command(data, run))


def test_one_compilation_whatever_the_images(undisturbed, data):
    """500 image sizes, the last partial step and every evaluation: the step and the evaluation compile once each."""
    run, output = undisturbed
    steps = max(losses(run))
    rows = len(np.load(run / "plan" / "row_offsets.npy")) - 1
    assert steps == -(-rows // ROWS) and rows % ROWS  # to the end of the plan, whose last step is not full
    assert not len(np.load(run / "plan" / "rejected.npy"))
    assert compilations(output, "step") == 1
    assert sum("eval/accuracy" in row for row in read_metrics(run)) > 1
    assert compilations(output, "generate_tokens") == 1
    assert {"eval/accuracy", "eval/examples"} <= read_metrics(run)[-1].keys()


@pytest.mark.parametrize("kills", [1, pytest.param(6, marks=pytest.mark.slow)])
def test_killed_and_started_again_the_losses_are_bitwise_the_same(undisturbed, data, tmp_path, kills):
    run, want = tmp_path / "killed", losses(undisturbed[0])
    draw = random.Random(time.time_ns())
    at = sorted(draw.choices(range(2, len(want) - 1), k=kills))
    for i, step in enumerate(at):
        kill_at(data, run, max(step, max(losses(run), default=0) + 1), tmp_path / f"log{i}")
    output = finish(command(data, run))
    assert losses(run) == want, f"killed at steps {at}"
    assert compilations(output, "step") == 1
    continued = re.search(r"continuing from step (\d+)", output)
    # A checkpoint is certainly there when the next one has begun.
    assert continued or at[-1] <= 2 * CHECKPOINT_EVERY, output[-2000:]


def test_a_finished_run_started_again_changes_nothing(undisturbed, data):
    run, _ = undisturbed
    before = (run / "metrics.jsonl").read_text()
    finish(command(data, run))
    assert (run / "metrics.jsonl").read_text() == before


def test_eval_scores_a_run(undisturbed, data, tmp_path):
    run, _ = undisturbed
    words = [sys.executable, "eval.py", f"--checkpoint={run}", f"--data={data}/test", f"--out={tmp_path}", "--batch=16"]
    output = finish(words)
    assert compilations(output, "generate_tokens") == 1
    report = json.loads((tmp_path / "report.json").read_text())
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert report["count"] == len(answers) == 60
    assert report["accuracy"] == np.mean([a["prediction"] == a["reference"] for a in answers])


def test_training_starts_from_an_export_on_eight_devices_as_on_one(undisturbed, data, tmp_path):
    """A run, exported, starts two trainings, one of them sharded: equal losses, frozen parts untouched."""
    finish([sys.executable, "-m", "convert", "to-hf", str(undisturbed[0]), str(tmp_path / "hf")])
    (tmp_path / "hf" / "remote_code.py").write_text("raise SystemExit('never run')")
    frozen = '--config.optim.lr_rules=(("decoder", 1.0), (".", 0.0))'
    more = [frozen, f"--config.init_from={tmp_path / 'hf'}", "--config.optim.steps=3", "--config.data.batch_rows=8"]
    finish(command(data, tmp_path / "one", *more))
    eight = environment()
    eight["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"
    words = command(data, tmp_path / "eight", *more)
    done = subprocess.run(words, cwd=ROOT, env=eight, capture_output=True, text=True)
    assert done.returncode == 0 and "fsdp 8" in done.stdout, done.stderr[-2000:]
    one, many = losses(tmp_path / "one"), losses(tmp_path / "eight")
    assert len(one) == 3
    np.testing.assert_allclose(list(many.values()), list(one.values()), atol=1e-5)
    back = tmp_path / "back"
    finish(
        [sys.executable, "-m", "convert", "to-hf", str(tmp_path / "eight"), str(back), "--like", str(tmp_path / "hf")]
    )
    differing = subprocess.run(
        [sys.executable, "-m", "convert", "verify", str(tmp_path / "hf"), str(back)],
        cwd=ROOT, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    names = re.findall(r"different: (\S+),", differing.stdout + differing.stderr)
    assert names and not [name for name in names if "vision" in name or "projector" in name]
    assert (tmp_path / "eight" / "assets" / "remote_code.py").exists() and (back / "remote_code.py").exists()


def test_a_mixture_planned_beforehand(data, tmp_path):
    """Two sources and a stage, planned on the command line; a training takes the plan, and no other one."""
    mixture = tmp_path / "mix.toml"
    mixture.write_text(
        f'[[sources]]\npath = "{data}/train"\nweight = 3\n[[sources]]\npath = "{data}/test"\nweight = 1\n'
        '[[stages]]\nname = "one"\nexamples = 200\n[[stages]]\nname = "two"\n'
    )
    sizes = ["--length", "128", "--num-patches", "80", "--batch-rows", str(ROWS)]
    patches = ["--patch-size", "8", "--min-patches", "2", "--max-patches", "40"]
    plan = [sys.executable, "-m", "phivision_jax.cli", "data", "plan", str(mixture), "--out", str(tmp_path / "plan")]
    printed = finish([*plan, "--stage", "one", *sizes, *patches])
    assert re.search(r"source train +150 examples +75.00%.*asked 75.00% of examples", printed)
    words = [f"--config.data.path={mixture}", "--config.data.stage=one", f"--config.data.plan={tmp_path / 'plan'}"]
    words += ["--config.data.eval_path=", "--config.optim.steps=2"]
    finish(command(data, tmp_path / "run", *words))
    made, taken = (json.loads((tmp_path / d / "plan.json").read_text())["hash"] for d in ("plan", "run/plan"))
    assert made == taken
    other = command(data, tmp_path / "other", *words, "--config.data.num_patches=96")
    refused = subprocess.run(other, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert "num_patches is 80 there, 96 here" in refused.stderr and refused.returncode != 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config.data.path=nowhere"], "nowhere"),
        (["--config.optim.steps=100000"], "raise data.epochs"),
        (["--config.data.length=8"], "length is 128 there, 8 here"),
        (["--config.mesh.fsdp=3"], "needs 3 devices"),
        (["--config.data.seed=1"], "another plan"),
        (["--config.data.batch_rows=20"], "batch_rows is 10 there, 20 here"),
        (["--config.optim.learning_rate=1"], "optim.learning_rate is 0.0006 there, 1.0 here: this run was"),
        (["--config.dtype=float23"], "dtype must be one of 'float32', 'bfloat16'"),
        (["--config.optim.learnig_rate=1"], "there is no field learnig_rate; did you mean learning_rate?"),
        (["--config.zzz=1"], "train.py: --config.zzz=1: there is no field zzz; python train.py --config=FILE --help"),
        (["--config=configs/tinny.py"], "--config: No such file or directory: 'configs/tinny.py'; give"),
        (["--config=configs", "--config.optim.steps=1"], "--config: Is a directory: 'configs'; give"),
        (["--config=README.md"], "(README.md, line "),
        (
            ["--config=configs/tiny.py:nope"],
            "train.py: configs/tiny.py has the variants '' and 'long', not 'nope'; python",
        ),
        (["--config.optim.steps=some"], "train.py: flag --config.optim.steps=some: invalid literal for int()"),
        (["--rnu=x"], "train.py: Unknown command line flag 'rnu'"),
    ],
)
def test_mistakes_get_a_sentence(undisturbed, data, words, message):
    done = subprocess.run(
        command(data, undisturbed[0], *words), cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.returncode != 0 and message in done.stderr
    assert "Traceback" not in done.stderr
