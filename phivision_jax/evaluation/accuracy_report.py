"""The report of an evaluation: accuracy by mode and task in the terminal, and files to compute with."""

from __future__ import annotations

import dataclasses
import json

from phivision_jax.evaluation.runner import EvalResult
from phivision_jax.io.html import Section, Table
from phivision_jax.io.storage import Location


def accuracy_section(title: str, result: EvalResult) -> Section:
    """The accuracies as a table."""
    groups = {**result.by_task, "all": (result.accuracy, len(result.answers))}
    rows = [(name, f"{accuracy:.1%}", f"{count:,}") for name, (accuracy, count) in groups.items()]
    return Section(title, table=Table(("mode/task", "accuracy", "questions"), rows))


def write_report(directory: Location, result: EvalResult, **settings: str) -> None:
    """Write ``report.json`` (the numbers and settings of an evaluation) and ``answers.jsonl`` (one answer per line)."""
    directory.mkdir(parents=True, exist_ok=True)
    answers = [json.dumps(dataclasses.asdict(answer)) + "\n" for answer in result.answers]
    numbers = {**settings, "accuracy": result.accuracy, "count": len(answers), "by_task": result.by_task}
    (directory / "answers.jsonl").write_text("".join(answers))
    (directory / "report.json").write_text(json.dumps(numbers, indent=1) + "\n")
