"""The figures of a report: accuracy against cost with the Pareto frontier, and thinking length against correctness."""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import EngFormatter

from phivision_jax.evaluation.report.numbers import MODES, ModeScore, ThoughtBin
from phivision_jax.evaluation.report.published import Point, points_of
from phivision_jax.io.html import Figure, plot

COLOURS: dict[str, str] = dict(zip(MODES, ("#0072b2", "#d55e00", "#009e73"), strict=True))
"""Colours of modes."""
MARKERS: dict[str, str] = dict(zip(MODES, "o^s", strict=True))
_PUBLISHED = "#7a818a"
_COLUMNS = 4
_COSTS = {"seconds": "seconds per item", "output_tokens": "output tokens per item"}


class Candidate(NamedTuple):
    """A point of accuracy against cost."""

    cost: float
    score: float
    label: str


def pareto(points: Sequence[Candidate]) -> list[Candidate]:
    """The points that no other point beats in cost and score, by rising cost."""
    found: list[Candidate] = []
    for point in sorted(points, key=lambda point: (point.cost, -point.score)):
        if not found or point.score > found[-1].score:
            found.append(point)
    return found


def mean_candidates(scores: Sequence[ModeScore], cost: str) -> list[Candidate]:
    """Mean score and cost of each mode over the benchmarks that have all of the run's modes."""
    modes = [mode for mode in MODES if any(score.mode == mode for score in scores)]
    by_name: defaultdict[str, dict[str, ModeScore]] = defaultdict(dict)
    for score in scores:
        if np.isfinite(getattr(score, cost)):
            by_name[score.benchmark][score.mode] = score
    complete = [found for found in by_name.values() if len(found) == len(modes)]
    return [
        Candidate(
            float(np.mean([getattr(found[mode], cost) for found in complete])),
            float(np.mean([found[mode].score.mean for found in complete])),
            mode,
        )
        for mode in modes
        if complete
    ]


def mean_figure(scores: Sequence[ModeScore]) -> Figure:
    """Mean accuracy over all benchmarks against seconds and output tokens."""

    def draw(canvas: Canvas) -> None:
        for axes, (cost, label) in zip(canvas.subplots(1, 2), _COSTS.items(), strict=True):
            candidates = mean_candidates(scores, cost)
            for point in candidates:
                axes.plot(point.cost, point.score, MARKERS[point.label], color=COLOURS[point.label], markersize=9)
                axes.annotate(point.label, point[:2], (7, 6), textcoords="offset points", fontsize=10)
            axes.set(xlabel=label, ylabel="mean score")
            _margins(axes, [point.cost for point in candidates])
            _frontier(axes, candidates)

    caption = (
        "Mean of the benchmarks that were answered in every mode · line: Pareto frontier, the best score at each cost"
    )
    return plot(draw, caption, 4.2)


def cost_figure(scores: Sequence[ModeScore], points: Sequence[Point], cost: str) -> Figure:
    """Score against one cost ("seconds", "output_tokens"), a panel per benchmark."""
    names = list(dict.fromkeys((score.benchmark, score.title) for score in scores))
    columns = min(len(names), _COLUMNS)
    rows = -(-len(names) // columns)

    def draw(canvas: Canvas) -> None:
        panels = canvas.subplots(rows, columns, squeeze=False).ravel()
        for axes in panels[len(names) :]:
            axes.remove()
        for axes, (name, title) in zip(panels, names, strict=False):
            mine = [score for score in scores if score.benchmark == name and np.isfinite(getattr(score, cost))]
            _panel(axes, mine, points_of(points, name, title), cost)
            axes.set_title(title)
        if panels[0].containers:
            panels[0].legend(loc="best")

    caption = f"Score against {_COSTS[cost]} · bars: 95 % intervals · line: Pareto frontier\n"
    caption += "Dashed: published scores of this model in the colour of their mode, and of other models in grey"
    return plot(draw, caption, 0.4 + 2.7 * rows)


def _panel(axes: Axes, scores: Sequence[ModeScore], published: Sequence[Point], cost: str) -> None:
    candidates = []
    for score in scores:
        point = Candidate(getattr(score, cost), score.score.mean, score.mode)
        candidates.append(point)
        finite = np.isfinite(score.score.se)
        below, above = (point.score - score.score.low, score.score.high - point.score) if finite else (0, 0)
        bars = axes.errorbar(point.cost, point.score, [[below], [above]], fmt=MARKERS[score.mode], capsize=2,
                             color=COLOURS[score.mode], markersize=6)  # fmt: skip
        bars.set_label(score.mode)
    for other in published:
        price, mode = other.seconds if cost == "seconds" else other.tokens, other.model.rpartition(", ")[2]
        colour = COLOURS.get(mode, _PUBLISHED)  # the modes of this model have rows of their own in the CSV
        if price is not None:
            axes.plot(price, other.accuracy, "D", color=colour, markersize=5)
            axes.annotate(other.model, (price, other.accuracy), (6, -3), textcoords="offset points", fontsize=7)
            candidates.append(Candidate(price, other.accuracy, other.model))
            continue
        axes.axhline(other.accuracy, color=colour, linewidth=0.9, linestyle="--", zorder=1)
        if mode not in COLOURS:
            label = axes.annotate(f"{other.model} {other.accuracy:g}", (1, other.accuracy), (0, 2),
                                  ("axes fraction", "data"), "offset points")  # fmt: skip
            label.set(fontsize=7, color=colour, ha="right")
    _margins(axes, [point.cost for point in candidates])
    _frontier(axes, candidates)


def _frontier(axes: Axes, candidates: Sequence[Candidate]) -> None:
    """A staircase: at each cost, the best score of the points that cost no more."""
    if best := pareto(candidates):
        costs, scores = [*(point.cost for point in best), axes.get_xlim()[1]], [point.score for point in best]
        axes.step(costs, [*scores, scores[-1]], where="post", color="#999999", linewidth=1, zorder=0)


def _margins(axes: Axes, costs: Sequence[float]) -> None:
    """Costs from 0, so that their ratios show."""
    axes.set_xlim(0, 1.15 * max(costs, default=1) or 1)
    axes.margins(y=0.2)
    axes.grid()
    axes.xaxis.set_major_formatter(EngFormatter(sep="") if axes.get_xlim()[1] > 1000 else "{x:g}")


def thought_figure(bins: Sequence[ThoughtBin]) -> Figure:
    """Accuracy by length of the thought, and how many replies think for so long."""

    def draw(canvas: Canvas) -> None:
        accuracy, counts = canvas.subplots(1, 2)
        firsts = sorted({each.first for each in bins})
        labels = {each.first: f"{each.first}+" if each.last is None else f"{each.first}–{each.last}" for each in bins}
        modes = [mode for mode in MODES if any(each.mode == mode for each in bins)]
        for k, mode in enumerate(modes):
            mine = [each for each in bins if each.mode == mode]
            x = np.array([firsts.index(each.first) for each in mine]) + (k - (len(modes) - 1) / 2) * 0.25
            means, lows, highs = (np.array([getattr(b.score, f) for b in mine]) for f in ("mean", "low", "high"))
            errors = 100 * np.array([means - lows, highs - means])
            accuracy.errorbar(x, 100 * means, errors, fmt=MARKERS[mode], color=COLOURS[mode], capsize=3, label=mode)
            counts.bar(x, [each.score.n for each in mine], 0.25, color=COLOURS[mode], label=mode)
        accuracy.set(ylabel="mean score, %", ylim=(0, 105))
        counts.set(ylabel="replies")
        for axes in (accuracy, counts):
            axes.set(xlabel="tokens of the thought", xticks=range(len(firsts)), xticklabels=[labels[f] for f in firsts])
            axes.set_xlim(-0.6, len(firsts) - 0.4)
            axes.grid(axis="y")
        accuracy.legend(loc="lower left")

    caption = "Replies that think, of all benchmarks · bars: 95 % intervals that respect clusters"
    return plot(draw, caption, 3.6)
