"""The report of an evaluation: accuracy by mode and task in the terminal, and files to compute with."""

from __future__ import annotations

import dataclasses
import json

from phivision_jax.evaluation.runner import Answer, EvalResult
from phivision_jax.io.html import Section, Table
from phivision_jax.io.storage import Location


@dataclasses.dataclass(frozen=True)
class Report:
    """Accuracy overall and by mode and task, with every answer."""

    checkpoint: str
    data: str
    mode: str
    accuracy: float
    count: int
    by_task: dict[str, tuple[float, int]]
    """Accuracy and number of questions of each "mode/task"."""
    answers: tuple[Answer, ...]

    def section(self) -> Section:
        """The accuracies as a table."""
        groups = {**self.by_task, "all": (self.accuracy, self.count)}
        rows = [(name, f"{accuracy:.1%}", f"{count:,}") for name, (accuracy, count) in groups.items()]
        title = f"{self.checkpoint} on {self.data}, mode {self.mode}"
        return Section(title, table=Table(("mode/task", "accuracy", "questions"), rows))


def make_report(result: EvalResult, *, checkpoint: str, data: str, mode: str) -> Report:
    """The report of an evaluation's answers; ``checkpoint`` and ``data`` are named in it."""
    by_task = result.by(lambda answer: f"{answer.mode}/{answer.task}")
    return Report(checkpoint, data, mode, result.accuracy, len(result.answers), by_task, result.answers)


def write_report(report: Report, directory: Location) -> None:
    """Write ``report.json`` (the numbers) and ``answers.jsonl`` (one answer per line)."""
    directory.mkdir(parents=True, exist_ok=True)
    numbers = dataclasses.asdict(report)
    answers = numbers.pop("answers")
    (directory / "answers.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    (directory / "report.json").write_text(json.dumps(numbers, indent=1) + "\n")
