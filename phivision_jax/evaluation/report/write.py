"""Write the report of an evaluation beside its rows.

OUT/report.html       the page; opens as a file or over HTTP, and loads nothing from elsewhere
OUT/report.md         its tables
OUT/report.json       all numbers; "settings" and "summaries" are those that the evaluation has written
OUT/data/             rows of the page (``rows``), its script and style
OUT/plots/            its figures
OUT/images/           images of the items, written by the evaluation
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from phivision_jax.evaluation.benchmark import Benchmark
from phivision_jax.evaluation.benchmarks.registry import NAMES, find
from phivision_jax.evaluation.output import ABOUT
from phivision_jax.evaluation.report import comparison, figures, numbers, tables
from phivision_jax.evaluation.report.markdown import markdown
from phivision_jax.evaluation.report.published import Point, published_points
from phivision_jax.evaluation.report.rows import write_rows
from phivision_jax.evaluation.results import Result, load_results
from phivision_jax.evaluation.summary import summarize
from phivision_jax.io import atomic
from phivision_jax.io.html import Figure, Section, page
from phivision_jax.io.messages import shorten
from phivision_jax.io.storage import Location

_PAGE = Path(__file__).parent / "page"


def write_report(
    directory: Location, compare: Location | None = None, benchmarks: Mapping[str, Benchmark] | None = None
) -> list[Section]:
    """Write the report of an evaluation into its directory, and return its sections.

    Args:
      directory: has the rows of an evaluation (``evaluation.results``).
      compare: directory of another evaluation, to compare with item by item.
      benchmarks: by name, beside those that are built in, for titles, published figures and statistics other than the
        mean; rows of others are reported as the mean of their scores.

    Raises:
      ValueError: when there is no evaluation, it has no rows yet, or the two have no item in common.
    """
    settings, results = load_results(directory)
    if not results:
        raise ValueError(f"{directory} has no results yet")
    names = dict.fromkeys(result.benchmark for result in results)
    benchmarks = {name: find(name) for name in names if name in NAMES} | dict(benchmarks or {})
    groups = numbers.group(results)
    points = published_points()
    scores = [numbers.mode_score(rows, benchmarks, points) for rows in groups.values()]
    chosen = [numbers.choice(groups, name, benchmarks) for name in names]
    choices = [choice for choice in chosen if choice is not None]
    bins, compared, other = numbers.thought_bins(results), [], None
    if compare is not None:
        theirs = load_results(compare)[1]
        compared, other = comparison.compare(results, theirs, benchmarks), comparison.match(results, theirs)
        if not compared:
            raise ValueError(f"{directory} and {compare} have no item in common in the same benchmark and mode")
    sections = _sections(groups, scores, choices, bins, points, benchmarks)
    if compare is not None:
        sections.insert(1, tables.comparison(compared, str(compare)))
    sections.append(tables.settings_table(settings, _setting))
    title = f"Evaluation of {shorten(settings.get(ABOUT, {}).get('model', directory.name))}"
    known = {name: benchmarks[name] for name in names if name in benchmarks}
    summaries = summarize([result for result in results if result.benchmark in known], known)
    found = {
        "settings": settings,
        "summaries": summaries,
        "scores": scores,
        "choices": choices,
        "thought_bins": bins,
        "comparison": compared,
    }
    _write_page(directory, title, sections, results, benchmarks, other)
    atomic.write(directory / "report.md", markdown(title, sections))
    atomic.write(directory / "report.json", json.dumps(_plain(found), indent=1) + "\n")
    return sections


def _sections(
    groups: numbers.Groups,
    scores: Sequence[numbers.ModeScore],
    choices: Sequence[numbers.Choice],
    bins: Sequence[numbers.ThoughtBin],
    points: Sequence[Point],
    benchmarks: Mapping[str, Benchmark],
) -> list[Section]:
    plots = [figures.mean_figure(scores)]
    plots += [figures.cost_figure(scores, points, cost) for cost in ("seconds", "output_tokens")]
    thoughts = tables.thinking(groups, benchmarks)
    if thoughts and bins:
        thoughts = thoughts._replace(figures=[figures.thought_figure(bins)])
    found = [
        tables.scores(scores),
        Section("Accuracy against cost", figures=plots),
        tables.costs(scores),
        tables.choices(choices),
        thoughts,
        tables.gaps(scores),
        tables.figures(scores, benchmarks),
        tables.sources(scores, points, benchmarks),
    ]
    return [section for section in found if section is not None]


def _write_page(
    directory: Location,
    title: str,
    sections: Sequence[Section],
    results: Sequence[Result],
    benchmarks: Mapping[str, Benchmark],
    other: Mapping[tuple[str, str, str], Result] | None,
) -> None:
    for folder in ("data", "plots"):
        (directory / folder).mkdir(exist_ok=True)
    write_rows(directory / "data", results, benchmarks, other)
    for file in _PAGE.iterdir():
        atomic.write(directory / "data" / file.name, file.read_bytes(), durable=False)
    names: dict[bytes, str] = {}
    for section in sections:
        for figure in section.figures:
            names |= _write_plots(directory / "plots", figure, len(names) // 2)
    answers = Section("Answers", id="answers")
    text = page(
        title,
        [*sections[:-1], answers, sections[-1]],
        scripts=("data/answers.js", "data/index.js"),
        stylesheets=("data/answers.css",),
        address=names.__getitem__,
    )
    atomic.write(directory / "report.html", text)


def _write_plots(folder: Location, figure: Figure, n: int) -> dict[bytes, str]:
    """Addresses of the light and the dark version of a figure."""
    assert figure.dark is not None
    names = {}
    for png, name in ((figure.png, f"{n}.png"), (figure.dark, f"{n}-dark.png")):
        atomic.write(folder / name, png, durable=False)
        names[png] = f"plots/{name}"
    return names


def _setting(value: Any) -> str:
    return shorten(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), 300)


def _plain(value: Any) -> Any:
    """Values of JSON: numbers that JSON does not have become null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
