"""What an evaluation leaves behind: a table to read, and files to compute with."""

from __future__ import annotations

import dataclasses
import functools
import json
import textwrap
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.table import Table

from phivision_jax.evaluation.runner import Answer, EvalResult
from phivision_jax.io.storage import Location


@dataclasses.dataclass(frozen=True)
class Report:
    """Accuracy overall and by task, with every answer."""

    checkpoint: str
    data: str
    mode: str
    accuracy: float
    count: int
    by_task: dict[str, tuple[float, int]]
    answers: tuple[Answer, ...]


def make_report(result: EvalResult, *, checkpoint: str, data: str, mode: str) -> Report:
    by_task = result.by(lambda answer: f"{answer.mode}/{answer.task}")
    return Report(checkpoint, data, mode, result.accuracy, len(result.answers), by_task, result.answers)


def print_report(report: Report) -> None:
    table = Table(title=f"{report.checkpoint} on {report.data}, mode {report.mode}")
    table.add_column("mode/task")
    table.add_column("accuracy", justify="right")
    table.add_column("questions", justify="right")
    for name, (accuracy, count) in report.by_task.items():
        table.add_row(name, f"{accuracy:.1%}", f"{count:,}")
    table.add_section()
    table.add_row("all", f"{report.accuracy:.1%}", f"{report.count:,}")
    Console().print(table)


def write_report(report: Report, directory: Location) -> None:
    """``report.json`` (the numbers) and ``answers.jsonl`` (one answer per line)."""
    directory.mkdir(parents=True, exist_ok=True)
    values = dataclasses.asdict(report)
    answers = values.pop("answers")
    (directory / "answers.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    (directory / "report.json").write_text(json.dumps(values, indent=1) + "\n")


def picture_with_answer(image: Image.Image, question: str, answer: str, path: Path, footer: str = "") -> None:
    """One picture, what was asked about it and what was answered, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    asked = "\n".join(textwrap.wrap(question, 52))
    answered = "\n".join(textwrap.wrap(answer, 44)) or "(no answer)"
    # In inches; a strip of a picture is shown within 10, at its own proportions.
    width, above, below = 5.2, 0.4 + 0.2 * asked.count("\n"), 0.7 + 0.25 * answered.count("\n")
    middle = min(width * image.height / image.width, 10.0)
    height = above + middle + below
    figure = plt.figure(figsize=(width, height))
    axes = figure.add_axes((0.02, below / height, 0.96, middle / height))
    axes.imshow(image.convert("RGB"), interpolation="nearest")
    axes.set_axis_off()
    text = functools.partial(figure.text, va="top", parse_math=False)
    text(0.02, 1 - 0.1 / height, asked, fontsize=12)
    text(0.02, (below - 0.1) / height, answered, fontsize=14, fontweight="bold")
    text(0.98, 0.2 / height, footer, fontsize=7, color="0.4", ha="right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
