"""The report of an evaluation: accuracy by mode and task in the terminal, and files to compute with."""

from __future__ import annotations

import dataclasses
import json

from phivision_jax.evaluation.runner import EvalResult
from phivision_jax.io.html import Section, Table
from phivision_jax.io.storage import Location


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of an evaluation and its settings."""

    checkpoint: str
    data: str
    mode: str
    result: EvalResult

    def section(self) -> Section:
        """The accuracies as a table."""
        groups = {**self.result.by_task, "all": (self.result.accuracy, len(self.result.answers))}
        rows = [(name, f"{accuracy:.1%}", f"{count:,}") for name, (accuracy, count) in groups.items()]
        title = f"{self.checkpoint} on {self.data}, mode {self.mode}"
        return Section(title, table=Table(("mode/task", "accuracy", "questions"), rows))


def write_report(report: Report, directory: Location) -> None:
    """Write ``report.json`` (the numbers) and ``answers.jsonl`` (one answer per line)."""
    directory.mkdir(parents=True, exist_ok=True)
    numbers = dataclasses.asdict(report)
    answers = numbers.pop("result")["answers"]
    numbers |= {"accuracy": report.result.accuracy, "count": len(answers), "by_task": report.result.by_task}
    (directory / "answers.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    (directory / "report.json").write_text(json.dumps(numbers, indent=1) + "\n")
