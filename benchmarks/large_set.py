"""Time to import, open and plan a million records, and host memory while training on them.

    python benchmarks/large_set.py --work /tmp/large --out docs/results/large_set   # writes .json and .png

The images are small (16x16), so that the number of records dominates. Training is ``train.py`` with a model of a few
thousand parameters, in a separate process whose resident memory is read from /proc.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from phivision_jax.batch import RowShape
from phivision_jax.config import DecoderConfig, ModelConfig, VisionConfig
from phivision_jax.data.plan.mixture import Mixture
from phivision_jax.data.plan.plan import make_plan
from phivision_jax.data.records import Record
from phivision_jax.data.sources.source import Read
from phivision_jax.data.store.dataset import Dataset
from phivision_jax.data.store.importing import import_source
from phivision_jax.processor import Processor
from phivision_jax.training.telemetry.metrics import read_metrics

ROOT = Path(__file__).parents[1]
WORDS = ["red", "green", "blue", "dark", "light", "small", "large", "round", "square", "open", "full", "quiet"]
ROW = RowShape(240, 1, 128)
BATCH_ROWS = 8
TRAIN = {
    "model.vision.hidden_size": 16, "model.vision.intermediate_size": 16, "model.vision.num_layers": 2,
    "model.vision.num_heads": 2, "model.vision.patch_size": 8, "model.decoder.hidden_size": 16,
    "model.decoder.intermediate_size": 16, "model.decoder.num_layers": 1, "model.decoder.num_heads": 2,
    "model.decoder.num_kv_heads": 1, "model.min_patches": 4, "model.max_patches": 16, "data.length": ROW.length,
    "data.num_patches": ROW.num_patches, "data.batch_rows": BATCH_ROWS, "data.epochs": 1, "log_every": 10,
    "checkpoint_every": 10_000, "eval_every": 0,
}  # fmt: skip


class GeneratedRecords:
    """A source of ``n`` records, each with a random image and random words."""

    name = "made-up"

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def key(self) -> Any:
        return {"made-up": self.n}

    def read(self, start: int, stop: int) -> Iterator[Read]:
        for i in range(start, stop):
            rng = np.random.default_rng(i)
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(file, "PNG", compress_level=1)
            words = " ".join(WORDS[k] for k in rng.integers(0, len(WORDS), rng.integers(2, 20)))
            think = i % 5 == 0
            answer = f"<think>{words}</think>yes" if think else "no"
            messages = (
                {"role": "user", "content": f"<image>\n{words}?"},
                {"role": "assistant", "content": answer},
            )
            record = Record(f"r{i:07d}", self.name, (file.getvalue(),), messages, "think" if think else "nothink")
            yield Read(record, "stated", system=False, where=f"record {i}")


def resident_mb(pid: int) -> float:
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) / 1024


def train(dataset: Path, run: Path, steps: int) -> list[tuple[int, float]]:
    """(step, resident MB) while ``train.py`` runs."""
    words = [f"--config.{key}={value}" for key, value in (TRAIN | {"optim.steps": steps}).items()]
    words += [f"--run={run}", f"--config.data.path={dataset}", "--config.data.eval_path="]
    process = subprocess.Popen([sys.executable, "train.py", "--config=configs/tiny.py", *words], cwd=ROOT)
    seen = []
    while process.poll() is None:
        time.sleep(0.5)
        try:
            rows = read_metrics(run)
            seen.append((rows[-1]["step"] if rows else 0, resident_mb(process.pid)))
        except (FileNotFoundError, ProcessLookupError, KeyError):
            continue
    if process.returncode:
        sys.exit(f"train.py ended with {process.returncode}")
    return [(int(step), mb) for step, mb in seen if step]


def plot(memory: list[tuple[int, float]], path: Path) -> None:
    steps, resident = zip(*memory, strict=True)
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    axes.plot(steps, resident, lw=1.5)
    axes.set(xlabel="step", ylabel="resident memory of train.py, MB", ylim=(0, 1.25 * max(resident)))
    axes.set_title("Host memory while training on a million records", loc="left")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory for the dataset and the run (about 1 GB)")
    parser.add_argument("--records", type=int, default=1_000_000, help="number of records")
    parser.add_argument("--steps", type=int, default=2_000, help="training steps")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.png")
    args = parser.parse_args()
    result: dict[str, Any] = {"records": args.records, "cores": os.cpu_count()}
    config = ModelConfig(
        vision=VisionConfig(patch_size=8),
        decoder=DecoderConfig(vocab_size=512, bos_token_id=507, eos_token_id=508, pad_token_id=509),
        min_patches=4,
        max_patches=16,
    )
    processor = Processor.small(config)

    began = time.perf_counter()
    import_source(GeneratedRecords(args.records), args.work / "set", processor)
    result["import_s"] = time.perf_counter() - began
    began = time.perf_counter()
    dataset = Dataset.open(args.work / "set")
    dataset[args.records // 2]
    result["open_s"] = time.perf_counter() - began
    began = time.perf_counter()
    plan = make_plan([dataset], Mixture.from_directories(args.work / "set"), processor, ROW, batch_rows=BATCH_ROWS)
    result["plan_s"] = time.perf_counter() - began
    result["plan_examples_per_s"] = len(plan.examples) / result["plan_s"]
    print(json.dumps(result, indent=2))

    memory = train(args.work / "set", args.work / "run", args.steps)
    warm = [mb for step, mb in memory if 0.1 * args.steps <= step <= 0.2 * args.steps]
    last = [mb for step, mb in memory if step >= 0.9 * args.steps]
    result["train"] = {
        "steps": args.steps,
        "resident_mb_at_10_to_20_percent": float(np.mean(warm)),
        "resident_mb_in_last_10_percent": float(np.mean(last)),
        "peak_resident_mb": max(mb for _, mb in memory),
        "memory": memory,
    }
    print(json.dumps({**result["train"], "memory": f"{len(memory)} points"}, indent=2))
    if args.out:
        args.out.with_suffix(".json").write_text(json.dumps(result) + "\n")
        plot(memory, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
