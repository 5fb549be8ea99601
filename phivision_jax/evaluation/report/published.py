"""Published accuracies of this model and others, each with its source."""

import csv
import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path

from phivision_jax.evaluation.benchmark import Published
from phivision_jax.text.constants import PromptMode

POINTS = Path(__file__).parents[1] / "published_points.csv"
MODEL = "Phi-4-reasoning-vision-15B"
"""The released model; its points are named "MODEL, MODE"."""
_COLUMNS = ["model", "benchmark", "accuracy", "seconds", "tokens", "source"]


@dataclasses.dataclass(frozen=True)
class Point:
    """A published accuracy, with what it costs where that is published too."""

    model: str
    benchmark: str
    accuracy: float
    """In per cent."""
    seconds: float | None
    """Per item."""
    tokens: float | None
    """Output tokens per item."""
    source: str


def published_points(path: Path = POINTS) -> list[Point]:
    """Read a CSV of published points; an empty number is one that is not published.

    Raises:
      ValueError: for other columns, a row without a source, or a number that is none, naming the line.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != _COLUMNS:
            raise ValueError(f"{path}: the columns must be {', '.join(_COLUMNS)}")
        return [_point(row, f"{path}:{reader.line_num}") for row in reader]


def _point(row: dict[str, str], where: str) -> Point:
    if not all(row[name] for name in ("model", "benchmark", "accuracy", "source")):
        raise ValueError(f"{where}: a point needs a model, a benchmark, an accuracy and a source")
    try:
        accuracy, seconds, tokens = (float(row[name]) if row[name] else None for name in _COLUMNS[2:5])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    assert accuracy is not None
    return Point(row["model"], row["benchmark"], accuracy, seconds, tokens, row["source"])


def points_of(points: Iterable[Point], *names: str) -> list[Point]:
    """The points of a benchmark that has these names, up to case and punctuation: "screenspot_v2" is ScreenSpot-v2."""
    wanted = {_plain(name) for name in names}
    return [point for point in points if _plain(point.benchmark) in wanted]


def published_score(
    points: Iterable[Point], published: Published | None, mode: PromptMode, *names: str
) -> float | None:
    """The published score of this model in a mode; that of a benchmark (``Benchmark.published``) is of mode "auto"."""
    found = [point.accuracy for point in points_of(points, *names) if point.model == f"{MODEL}, {mode}"]
    return found[0] if found else published.value if published is not None and mode == "auto" else None


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "", name).casefold()
