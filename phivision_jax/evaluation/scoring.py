"""Score answers against references, and report the accuracy by mode and task."""

from __future__ import annotations

import dataclasses
import json
import string
from collections import defaultdict

import numpy as np

from phivision_jax.io.html import Section, Table
from phivision_jax.io.storage import Location


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


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """Scored answers."""

    answers: tuple[Answer, ...]
    """In the order of the dataset."""

    @property
    def accuracy(self) -> float:
        return float(np.mean([answer.correct for answer in self.answers]))

    @property
    def by_task(self) -> dict[str, tuple[float, int]]:
        """Accuracy and number of questions of each "mode/task", in alphabetical order."""
        groups: dict[str, list[bool]] = defaultdict(list)
        for answer in self.answers:
            groups[f"{answer.mode}/{answer.task}"].append(answer.correct)
        return {name: (float(np.mean(correct)), len(correct)) for name, correct in sorted(groups.items())}


def exact_match(prediction: str, reference: str) -> bool:
    """True for answers that are equal up to thoughts, case, surrounding white space and punctuation."""

    def plain(text: str) -> str:
        return text.rsplit("</think>", 1)[-1].casefold().strip(string.whitespace + string.punctuation)

    return plain(prediction) == plain(reference)


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
