"""The tables of a report."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from phivision_jax.evaluation.benchmark import Benchmark
from phivision_jax.evaluation.report.comparison import Compared
from phivision_jax.evaluation.report.numbers import DISCORDANT, Choice, Groups, ModeScore, mean_thought, title_of
from phivision_jax.evaluation.report.published import Point, points_of
from phivision_jax.evaluation.statistics import ALPHA, POWER, Estimate, Paired
from phivision_jax.io.html import Section, Table

NONE = "–"


def interval(estimate: Estimate, factor: float = 1, digits: int = 1) -> str:
    """The interval as "71.2 to 78.9"; a dash for a single cluster, whose spread is unknown."""
    if not math.isfinite(estimate.se):
        return NONE
    return f"{factor * estimate.low:.{digits}f} to {factor * estimate.high:.{digits}f}"


def number(value: float | None, digits: int = 1, sign: str = "") -> str:
    """A number with its thousands separated; a dash for None, NaN and infinity."""
    return f"{value:{sign},.{digits}f}" if value is not None and math.isfinite(value) else NONE


def smallest(points: float | None) -> str:
    """A smallest detectable difference; a dash where it is unknown, as for scores that do not vary."""
    if points is None or points == 0 or not math.isfinite(points):
        return NONE
    return number(points) if points <= 100 else "> 100"


def probability(p: float) -> str:
    """A p value with two significant digits, down to 0.0001."""
    return "< 0.001" if p < 0.001 else f"{p:.2g}"


def scores(found: Sequence[ModeScore]) -> Section:
    """Score per benchmark and mode beside the published figure."""
    rows: list[Sequence[str]] = []
    for score in found:
        difference = None if score.published is None else score.score.mean - score.published
        rows.append((
            score.title,
            score.mode,
            _scoring(score),
            number(score.score.mean),
            interval(score.score),
            number(score.published),
            number(difference, sign="+"),
            f"{score.score.n:,}",
            f"{score.score.clusters:,}",
            smallest(score.paired),
            smallest(score.unpaired),
        ))  # fmt: skip
    header = (
        "benchmark",
        "mode",
        "scored by",
        "score",
        "95 % interval",
        "published",
        "difference",
        "items",
        "clusters",
    )
    more = ("smallest Δ, same items", "smallest Δ, other items")
    note = (
        "Intervals respect clusters: items on the same image are not independent. Smallest Δ: the smallest true "
        f"difference to another run that a test at α = {ALPHA} finds with probability {POWER}, on the same items if "
        f"the runs differ on {DISCORDANT:.0%} of them, or on as many other items."
    )
    return Section("Scores", note, table=Table((*header, *more), rows, names=3))


def _scoring(score: ModeScore) -> str:
    if score.counts.judged:
        return f"judge {', '.join(score.judges)} on {score.counts.judged:,}"
    return "rule only (published with a judge)" if score.needs_judge else "rule"


def figures(found: Sequence[ModeScore], benchmarks: Mapping[str, Benchmark]) -> Section | None:
    """Further figures of the benchmarks, beside the published ones; None without any."""
    rows = []
    for score in found:
        groups = benchmarks[score.benchmark].published_groups if score.benchmark in benchmarks else {}
        for name, value in score.figures.items():
            published = groups[name].value if name in groups else None
            rows.append((score.title, score.mode, name, number(value, 2), number(published)))
    table = Table(("benchmark", "mode", "figure", "value", "published"), rows, names=3)
    return Section("Further figures", table=table) if rows else None


def sources(found: Sequence[ModeScore], points: Sequence[Point], benchmarks: Mapping[str, Benchmark]) -> Section | None:
    """Published figures of this model and others, with their sources; None without any."""
    rows = []
    for name, title in dict.fromkeys((score.benchmark, score.title) for score in found):
        published, others = benchmarks[name].published if name in benchmarks else None, points_of(points, name, title)
        if published and all(point.accuracy != published.value for point in others):
            rows.append((title, "this model", published.source, number(published.value)))
        rows += [(title, point.model, point.source, number(point.accuracy)) for point in others]
        groups = benchmarks[name].published_groups if name in benchmarks else {}
        rows += [(f"{title}, {group}", "this model", p.source, number(p.value)) for group, p in groups.items()]
    table = Table(("benchmark", "model", "source", "published"), rows, names=3)
    return Section("Published figures", table=table) if rows else None


def gaps(found: Sequence[ModeScore]) -> Section | None:
    """Known and possible causes of each difference from a published score; None without published figures."""
    rows = []
    for score in found:
        if score.published is None:
            continue
        counts, difference = score.counts, score.score.mean - score.published
        causes = [score.differs] if score.differs else []
        causes += ["scored by the rule only, published with a judge"] if score.needs_judge and not counts.judged else []
        inside = score.score.low <= score.published <= score.score.high
        rows.append((
            score.title,
            score.mode,
            "; ".join(causes) or "nothing known",
            number(difference, sign="+"),
            "yes" if inside else "no",
            *(_at_stake(count, counts.items) for count in (counts.unparsed, counts.length, counts.errors)),
        ))  # fmt: skip
    header = ("benchmark", "mode", "known differences", "ours − published", "published in interval")
    note = "In parentheses: points that the score would gain at most if these items were all correct."
    table = Table((*header, "unparsed", "cut off at the limit", "failed"), rows, names=3)
    return Section("Differences from the published figures", note, table=table) if rows else None


def _at_stake(count: int, items: int) -> str:
    return f"{count:,} (≤ {100 * count / items:.1f})" if count else "0"


def costs(found: Sequence[ModeScore]) -> Section:
    """Mean time and tokens of a reply, and replies that have none or no end."""
    rows: list[Sequence[str]] = []
    for score in found:
        counts = score.counts
        means = number(score.seconds, 2), number(score.output_tokens, 0), number(score.thought_tokens, 0)
        numbers = (counts.unparsed, counts.length, counts.errors, counts.cached)
        rows.append((score.title, score.mode, number(score.score.mean), *means, *(f"{n:,}" for n in numbers)))
    header = ("benchmark", "mode", "score", "seconds", "output tokens", "thought tokens")
    note = (
        "Means of the replies; seconds run from the beginning of the prefill to the last token. Replies from the cache "
        "have the times of the request that filled it."
    )
    table = Table((*header, "unparsed", "cut off", "failed", "from cache"), rows, names=2)
    return Section("Cost", note, table=table)


def choices(found: Sequence[Choice]) -> Section | None:
    """Shares of items on which "auto" chose to think, and chose the better mode; None without all three modes."""
    rows = []
    for choice in found:
        better = choice.better
        rows.append((
            choice.title,
            f"{choice.n:,}",
            f"{choice.thought:.1%}",
            f"{choice.at_least_as_good.mean:.1%}",
            f"{choice.decisive:,}",
            f"{better.mean:.1%}" if better else NONE,
            interval(better, 100) if better else NONE,
            *map(number, (choice.auto, choice.think, choice.nothink, choice.best)),
            *_difference(choice.thinking_gain),
        ))  # fmt: skip
    header = ("benchmark", "items", "auto thought", "choice at least as good", "decisive items", "mode-switch score")
    more = ("95 % interval", "auto", "think", "nothink", "best of both", "think − nothink", "95 % interval", "p")
    note = (
        "Items that were answered in all three modes. An item is decisive if think and nothink, each forced, score "
        "differently on it; the mode-switch score is the share of decisive items on which auto chose the better mode "
        "(50 %: a coin). The choice is at least as good where the other mode would not have scored higher. Best of "
        "both: the score of a perfect choice."
    )
    return Section("Choice of the mode", note, table=Table((*header, *more), rows)) if rows else None


def thinking(groups: Groups, benchmarks: Mapping[str, Benchmark]) -> Section | None:
    """Mean length of thoughts of correct and other replies; None where nothing thought."""
    rows = []
    for (name, mode), results in groups.items():
        right, wrong = mean_thought(results, correct=True), mean_thought(results, correct=False)
        if right is not None or wrong is not None:
            share = sum(row.taken == "think" for row in results) / len(results)
            rows.append((title_of(name, benchmarks), mode, f"{share:.1%}", number(right, 0), number(wrong, 0)))
    header = ("benchmark", "mode", "replies that think", "thought tokens, correct", "thought tokens, other")
    return Section("Length of thoughts", table=Table(header, rows, names=2)) if rows else None


def comparison(found: Sequence[Compared], other: str) -> Section:
    """This run and another, item by item."""
    rows: list[Sequence[str]] = []
    for c in found:
        rows.append((
            c.title,
            c.mode,
            f"{c.n:,}",
            *(number(100 * value) for value in (c.theirs, c.ours)),
            *_difference(c.paired),
            f"{c.paired.only_b:,}",
            f"{c.paired.only_a:,}",
            f"{c.paired.equal:,}",
            smallest(100 * c.smallest),
            probability(c.paired.mcnemar_p),
            f"{c.changed:,}",
            f"{c.unmatched:,}",
        ))  # fmt: skip
    header = (
        "benchmark",
        "mode",
        "items",
        "other run",
        "this run",
        "difference",
        "95 % interval",
        "p",
        "gained",
        "lost",
    )
    more = ("equal", "smallest Δ", "McNemar p", "changed items", "in one run only")
    note = (
        f"Other run: {other}. Mean scores of the items that both runs have, in per cent; p: sign-flip test of the "
        "clusters' sums of differences. Smallest Δ: as above, for this comparison. McNemar's test takes items for "
        "independent. Items whose question, images or reference changed are left out."
    )
    return Section("Comparison item by item", note, table=Table((*header, *more), rows, names=2))


def _difference(paired: Paired) -> tuple[str, str, str]:
    difference = paired.difference
    return number(100 * difference.mean, sign="+"), interval(difference, 100), probability(paired.p)


def brief(section: Section, *columns: str) -> Section:
    """A section whose table has these columns only, for terminals."""
    assert section.table is not None
    chosen = [section.table.header.index(column) for column in columns]
    rows = [[row[i] for i in chosen] for row in section.table.rows]
    return Section(section.title, table=Table(columns, rows, names=2))


def settings_table(settings: Mapping[str, Any], text: Callable[[Any], str]) -> Section:
    """The settings of the run."""
    return Section("Settings", table=Table(("setting", "value"), [(k, text(v)) for k, v in settings.items()], names=2))
