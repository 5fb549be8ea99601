"""Score answers against references, and report the accuracy by mode and task."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from phivision_jax.io.storage import Location

if TYPE_CHECKING:
    from phivision_jax.io.html import Section

QUOTES = ('""', "''", "``", "“”", "‘’", "«»")
"""Pairs of quotation marks that ``exact_match`` removes around an answer."""


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


def exact_match(prediction: str, reference: str) -> bool:
    """True for answers that are equal up to what carries no meaning.

    That is: thoughts (all text up to ``</think>``), case, surrounding white space, one full stop at the end, and a pair
    of quotation marks around all of it, which may have the full stop inside. Everything else counts: a sign, an
    operator, a unit, a bracket, a decimal point, an article, any other punctuation. "-5", "5%", "(5)" and "5!" all
    differ from "5", and "?" from an empty answer.
    """
    return _plain(prediction) == _plain(reference)


def _plain(text: str) -> str:
    text = text.rsplit("</think>", 1)[-1].casefold()
    for _ in range(2):  # outside the quotation marks, then inside
        text = re.sub(r"(?<=[^.])\.\Z", "", text.strip()).strip()
        if len(text) > 2 and text[0] + text[-1] in QUOTES and not {text[0], text[-1]} & set(text[1:-1]):
            text = text[1:-1]
    return text.strip()


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
