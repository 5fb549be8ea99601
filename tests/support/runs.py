"""Training runs for tests: the smallest configuration, as a command of its own process, and what a run has written."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

from PIL import Image

from phivision_jax.config import DecoderConfig, ModelConfig
from phivision_jax.data.records import Record
from phivision_jax.io import jsonl
from phivision_jax.processor import Processor
from phivision_jax.training.telemetry.metrics import read_metrics
from tests.support.datasets import write_dataset
from tests.support.paths import ROOT

ROWS, CHECKPOINT_EVERY = 10, 3
SMALL = [
    "--config=configs/tiny.py",
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
SHORT = ("--config.optim.steps=12", "--config.data.eval_path=", "--config.checkpoint_every=4")


def write_data(folder: Path, sizes: int = 500) -> None:
    """``train`` and ``test`` below a folder: images of as many different sizes, each with its question."""
    decoder = DecoderConfig(vocab_size=512, bos_token_id=507, eos_token_id=508, pad_token_id=509)
    chosen = random.Random(0).sample([(w, h) for w in range(1, 90) for h in range(1, 90)], sizes)

    def record(i: int, size: tuple[int, int]) -> Record:
        path = folder / f"{i}.png"
        Image.new("RGB", size, (i % 256, i // 2 % 256, 7)).save(path)
        return Record(
            id=str(i),
            source="synthetic",
            images=(path.read_bytes(),),
            messages=(
                {"role": "user", "content": "<image>\nhow many?"},
                {"role": "assistant", "content": str(i % 7)},
            ),
            mode="nothink",
            task="general",
            metadata={},
        )

    records = [record(i, size) for i, size in enumerate(chosen)]
    processor = Processor.small(ModelConfig(decoder=decoder))
    write_dataset(folder / "train", records, processor)
    write_dataset(folder / "test", records[:60], processor)


def arguments(data: Path, run: Path | str, *more: str) -> list[str]:
    """Arguments of ``phivision train`` for the smallest run."""
    return [*SMALL, f"--run={run}", f"--config.data.path={data}/train", f"--config.data.eval_path={data}/test", *more]


def command(data: Path, run: Path | str, *more: str) -> list[str]:
    return [sys.executable, "train.py", *arguments(data, run, *more)]


def environment(devices: int = 1) -> dict[str, str]:
    """CPU devices, a log line for each compilation, and quick compilation: optimizing would cost more than it saves."""
    quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    quick += f" --xla_force_host_platform_device_count={devices}"
    return os.environ | {"JAX_LOG_COMPILES": "1", "XLA_FLAGS": quick, "JAX_PLATFORMS": "cpu"}


def finish(words: list[str], env: dict[str, str] | None = None) -> str:
    """Run a command to its end, which must be a good one; returns what it prints."""
    done = subprocess.run(words, cwd=ROOT, env=env or environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def fail(words: list[str], env: dict[str, str] | None = None, code: int = 1) -> str:
    """Run a command that must end with this exit code and a message, no traceback; returns what it prints."""
    done = subprocess.run(words, cwd=ROOT, env=env or environment(), capture_output=True, text=True)
    assert done.returncode == code, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def compilations(output: str, function: str) -> int:
    return len(re.findall(rf"Compiling jit\({function}\) ", output))


def losses(run: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_metrics(run) if "loss" in row}


def validations(run: Path) -> dict[int, float]:
    return {row["step"]: row["validation/loss"] for row in read_metrics(run) if "validation/loss" in row}


def records(run: Path, process: int = 0) -> dict[int, list[list[str]]]:
    """Record ids of each row, by step."""
    return {row["step"]: row["ids"] for row in jsonl.read(run / f"records_{process}.jsonl")}


def plan_hash(run: Path) -> str:
    return json.loads((run / "plan" / "plan.json").read_text())["hash"]
