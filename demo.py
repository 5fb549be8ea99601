"""The whole way, once: real pictures → training → evaluation → Hugging Face layout → loaded back → one answer.

    make demo

Every step prints the command that a user would type for it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from phivision_jax.data.sources.easy_vqa import easy_vqa, question_only_baseline
from phivision_jax.data.store.dataset import Dataset
from phivision_jax.images.decode import open_image
from phivision_jax.training.telemetry.metrics import read_metrics

DATA = Path("data/easy_vqa")
console = Console()


def command(*words: str | Path) -> float:
    """Show a command, run it, and return its seconds. A failure ends the demo with the command's own message."""
    line = [str(word) for word in words]
    console.rule(f"[bold]{shlex.join(line)}", align="left")
    began = time.monotonic()
    here = Path(sys.executable).parent
    if line[0] == "phivision":
        line[0] = str(here / "phivision")
    else:
        line[0] = sys.executable
    if (code := subprocess.run(line).returncode) != 0:
        sys.exit(code)
    return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description="Train, score, convert and ask a small model on easy-VQA.")
    parser.add_argument("--variant", default="", choices=["", "long"], help="of configs/tiny.py")
    parser.add_argument("--steps", type=int, default=0, help="train for fewer steps, to see it work")
    variant, steps = (args := parser.parse_args()).variant, args.steps
    config = "configs/tiny.py" + (f":{variant}" if variant else "")
    run = Path("runs") / ("tiny" + (f"-{variant}" if variant else ""))
    hf, picture = run / "hf", run / "answer.png"

    if not all((DATA / split / "manifest.json").exists() for split in ("train", "test")):
        command("phivision", "data", "import", "easy-vqa", DATA, "--questions-per-record", "3")
    shorter = [f"--config.optim.steps={steps}"] if steps else []
    seconds = command("python", "train.py", f"--config={config}", f"--run={run}", *shorter)
    command("python", "eval.py", f"--checkpoint={run}", f"--data={DATA}/test", f"--out={run}/eval")
    command("python", "-m", "convert", "to-hf", run, hf, "--overwrite")
    command("python", "-m", "convert", "verify", run, hf)

    record = Dataset.open(DATA / "test")[0]
    question = record.messages[0]["content"].replace("<image>", "").strip()
    image = run / "question.png"
    open_image(record.images[0]).save(image)
    command("phivision", "chat", hf, question, "--image", image, "--save-picture", picture)

    report = json.loads((run / "eval" / "report.json").read_text())
    trained = read_metrics(run)
    console.rule("[bold]summary", align="left")
    table = Table(show_header=False)
    table.add_row(
        "answering from the question alone", f"{question_only_baseline(easy_vqa('train'), easy_vqa('test')):.1%}"
    )
    table.add_row(
        "the trained model, on all test questions", f"[bold]{report['accuracy']:.1%}[/bold] of {report['count']:,}"
    )
    table.add_row("training", f"{trained[-1]['step']:,} steps in {seconds / 60:.1f} min")
    table.add_row("as a Hugging Face directory", str(hf))
    table.add_row(f"asked: {question}", f"picture, question and answer: {picture}")
    console.print(table)


if __name__ == "__main__":
    main()
