"""What an evaluation leaves behind: a table to read, and files to compute with."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.table import Table

from phivision_jax.evaluation.runner import Answer, EvalResult


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


def write_report(report: Report, directory: Path) -> None:
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

    figure, axes = plt.subplots(figsize=(5, 5.6), layout="constrained")
    axes.imshow(image.convert("RGB"), interpolation="nearest")
    axes.set_axis_off()
    axes.set_title("\n".join(textwrap.wrap(question, 48)), fontsize=12, loc="left")
    shown = "\n".join(textwrap.wrap(answer, 48)) or "(no answer)"
    axes.text(0, -0.03, shown, transform=axes.transAxes, fontsize=14, fontweight="bold", va="top", parse_math=False)
    if footer:
        figure.supxlabel(footer, fontsize=8, color="0.4")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
