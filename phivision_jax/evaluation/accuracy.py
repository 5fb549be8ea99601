"""Answers to the questions of a dataset, and their accuracy by mode and task."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from phivision_jax.io.storage import Location

if TYPE_CHECKING:
    from phivision_jax.io.html import Section


@dataclasses.dataclass(frozen=True)
class Answer:
    """One record's question, reference and generated answer."""

    id: str
    task: str
    mode: str
    question: str
    reference: str
    prediction: str
    correct: bool


def accuracy(answers: Sequence[Answer]) -> float:
    """Share of correct answers."""
    return float(np.mean([answer.correct for answer in answers]))


def accuracy_by_task(answers: Sequence[Answer]) -> dict[str, tuple[float, int]]:
    """Accuracy and number of questions of each "mode/task", in alphabetical order."""
    groups: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        groups[f"{answer.mode}/{answer.task}"].append(answer)
    return {name: (accuracy(group), len(group)) for name, group in sorted(groups.items())}


def accuracy_section(title: str, answers: Sequence[Answer]) -> Section:
    """The accuracies as a table."""
    from phivision_jax.io.html import Section, Table  # with matplotlib, which training need not load

    groups = {**accuracy_by_task(answers), "all": (accuracy(answers), len(answers))}
    rows = [(name, f"{share:.1%}", f"{count:,}") for name, (share, count) in groups.items()]
    return Section(title, table=Table(("mode/task", "accuracy", "questions"), rows))


def write_report(directory: Location, answers: Sequence[Answer], **settings: str) -> None:
    """Write ``report.json`` (the numbers and settings of an evaluation) and ``answers.jsonl`` (one answer per line)."""
    directory.mkdir(parents=True, exist_ok=True)
    numbers = {"accuracy": accuracy(answers), "count": len(answers), "by_task": accuracy_by_task(answers)}
    lines = [json.dumps(dataclasses.asdict(answer)) + "\n" for answer in answers]
    (directory / "answers.jsonl").write_text("".join(lines))
    (directory / "report.json").write_text(json.dumps(settings | numbers, indent=1) + "\n")
