"""Everything once: real images → training → evaluation → Hugging Face directory → loaded back → one answer.

    make demo

Every step prints the command that a user would type for it.
"""

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.table import Table

from phivision_jax.data.sources.easy_vqa import easy_vqa, question_only_baseline
from phivision_jax.data.store.dataset import Dataset
from phivision_jax.images.decode import open_image
from phivision_jax.training.telemetry.metrics import read_metrics

DATA = Path("data/easy_vqa")
console = Console()


def phivision(*words: str | Path) -> float:
    """Print a command, run it, and return its seconds; if it fails, the demo ends after the command's message."""
    line = ["phivision", *map(str, words)]
    console.rule(f"[bold]{shlex.join(line)}", align="left")
    began = time.monotonic()
    if code := subprocess.run([Path(sys.executable).with_name("phivision"), *line[1:]]).returncode:
        sys.exit(code)
    return time.monotonic() - began


def main(variant: Literal["", "long"] = "", steps: int = 0) -> None:
    """Train, score, convert and ask a small model on easy-VQA.

    Args:
        variant: Variant of configs/tiny.py.
        steps: Train for fewer steps, to see that it works; 0 for all.
    """
    config, run = f"configs/tiny.py:{variant}".rstrip(":"), Path(f"runs/tiny-{variant}" if variant else "runs/tiny")
    hf, answer = run / "hf", run / "answer.png"

    if not all((DATA / split / "manifest.json").exists() for split in ("train", "test")):
        phivision("data", "import", "easy-vqa", DATA, "--questions-per-record", "3")
    shorter = [f"--config.optim.steps={steps}"] if steps else []
    seconds = phivision("train", f"--config={config}", f"--run={run}", *shorter)
    phivision("eval", run, f"--config={config}", f"--data={DATA}/test", f"--out={run}/eval", "--restart")
    phivision("convert", "to-hf", run, hf, "--overwrite")
    phivision("convert", "verify", run, hf)

    record = Dataset.open(DATA / "test")[0]
    question = record.messages[0]["content"].replace("<image>", "").strip()
    image = run / "question.png"
    open_image(record.images[0]).save(image)
    phivision("chat", hf, question, "--image", image, "--save-image", answer)

    (scores,) = json.loads((run / "eval" / "report.json").read_text())["summaries"]
    baseline = question_only_baseline(easy_vqa("train"), easy_vqa("test"))
    console.rule("[bold]summary", align="left")
    table = Table(show_header=False)
    table.add_row("accuracy from the question alone", f"{baseline:.1%}")
    table.add_row(
        "accuracy of the trained model", f"[bold]{scores['figures']['score']:.1f}%[/bold] of {scores['items']:,}"
    )
    table.add_row("training", f"{read_metrics(run)[-1]['step']:,} steps in {seconds / 60:.1f} min")
    table.add_row("Hugging Face directory", str(hf))
    table.add_row(f"question: {question}", f"image, question and answer: {answer}")
    console.print(table)


if __name__ == "__main__":
    tyro.cli(main)
