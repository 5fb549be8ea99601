"""The numbers of a report, computed from the rows of an evaluation: scores, costs, choices of mode, thinking."""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import get_args

import numpy as np

from phivision_jax.evaluation import statistics
from phivision_jax.evaluation.benchmark import Benchmark
from phivision_jax.evaluation.report.published import Point, published_score
from phivision_jax.evaluation.results import Result
from phivision_jax.evaluation.statistics import Estimate, Paired
from phivision_jax.evaluation.summary import scored
from phivision_jax.text.constants import Mode, PromptMode

MODES: tuple[PromptMode, ...] = get_args(PromptMode)
DISCORDANT = 0.15
"""Assumed share of items on which two runs differ, for the smallest paired difference before there is a second run."""
THOUGHT_BINS = (1, 129, 257, 513, 1025, 2049, 4097)
"""First numbers of thought tokens of each bin; the last one is open."""

type Groups = dict[tuple[str, PromptMode], list[Result]]
"""Rows by benchmark, in order of appearance, and mode."""


@dataclasses.dataclass(frozen=True)
class Counts:
    """Numbers of items."""

    items: int
    errors: int
    """Requests or judgements that failed."""
    unparsed: int
    """Replies in which the rule found nothing to score."""
    length: int
    """Replies that were cut off at the limit of tokens."""
    judged: int
    """Scores that depend on a judge."""
    cached: int
    """Replies taken from the cache, whose times are those of an earlier request."""


@dataclasses.dataclass(frozen=True)
class ModeScore:
    """One benchmark in one mode. Scores are in the benchmark's unit, mostly per cent."""

    benchmark: str
    title: str
    mode: PromptMode
    score: Estimate
    method: str
    """"mean" of the items' scores, or "jackknife" of another statistic."""
    figures: Mapping[str, float]
    """Further figures of ``Benchmark.summary``."""
    unpaired: float
    """Smallest detectable difference to a run on other items of the same number."""
    paired: float | None
    """The same to a run on the same items if they differ on ``DISCORDANT`` of them; None where the score is no mean."""
    published: float | None
    """The published score of the model in this mode."""
    differs: str
    """Known differences between that measurement and ours."""
    judges: tuple[str, ...]
    """Names of the judges that scores depend on; none for a rule alone."""
    needs_judge: bool
    """True where the published score depends on a judge."""
    counts: Counts
    seconds: float
    """Mean time of a reply, without waiting; NaN without a reply."""
    output_tokens: float
    """Mean tokens of a reply, of thought and answer."""
    thought_tokens: float


@dataclasses.dataclass(frozen=True)
class Choice:
    """The choices of mode "auto" between thinking and not thinking, on items that were answered in all three modes.

    The chosen mode is better on an item if its forced answer has the higher score of the two forced answers.
    """

    benchmark: str
    title: str
    n: int
    thought: float
    """Share of items on which it chose to think."""
    at_least_as_good: Estimate
    """Share of items on which the other mode would not have scored higher."""
    decisive: int
    """Items on which the forced answers differ in score."""
    better: Estimate | None
    """The mode-switch score: share of the decisive items on which it chose the mode with the higher score."""
    auto: float
    """Mean score of "auto", per cent, as the next three."""
    think: float
    nothink: float
    best: float
    """Mean of the better forced answer of each item: the limit of any choice."""
    thinking_gain: Paired
    """think − nothink on the same items."""


@dataclasses.dataclass(frozen=True)
class ThoughtBin:
    """Replies of one mode whose thoughts have about the same length."""

    mode: PromptMode
    first: int
    """Fewest tokens."""
    last: int | None
    """Most tokens; None for no limit."""
    score: Estimate
    """Mean score, from 0 to 1."""


def group(results: Sequence[Result]) -> Groups:
    """Rows by benchmark and mode; the modes of a benchmark are in the order of ``MODES``."""
    found: defaultdict[tuple[str, PromptMode], list[Result]] = defaultdict(list)
    for result in results:
        found[result.benchmark, result.mode].append(result)
    names = dict.fromkeys(result.benchmark for result in results)
    return {(name, mode): found[name, mode] for name in names for mode in MODES if (name, mode) in found}


def values(results: Sequence[Result]) -> np.ndarray:
    """[n] scores from 0 to 1."""
    return np.array([result.value for result in results], float)


def clusters(results: Sequence[Result]) -> list[str]:
    """The cluster of each row; those of different benchmarks differ."""
    return [f"{result.benchmark}\n{result.cluster or result.item}" for result in results]


def title_of(name: str, benchmarks: Mapping[str, Benchmark]) -> str:
    """The title of a benchmark; its name if it is not known."""
    return benchmarks[name].title if name in benchmarks else name


def mode_score(results: Sequence[Result], benchmarks: Mapping[str, Benchmark], points: Sequence[Point]) -> ModeScore:
    """Score and cost of the rows of one benchmark in one mode, and the score in ``points`` or of the benchmark."""
    name, benchmark = results[0].benchmark, benchmarks.get(results[0].benchmark)
    stated = benchmark.published if benchmark is not None else None
    share = statistics.proportion_estimate(values(results), clusters(results))
    score, method, figures = _scaled(share, 100), "mean", {}
    paired: float | None = 100 * statistics.paired_difference(share, DISCORDANT)
    if benchmark is not None:
        items = [scored(result) for result in results]
        figures = dict(benchmark.summary(items))
        if abs(figures.pop("score") - score.mean) > 1e-6:
            method, paired = "jackknife", None
            score = statistics.jackknife_estimate(
                lambda chosen: benchmark.summary([items[i] for i in chosen])["score"], clusters(results)
            )
    replies = [result for result in results if not result.failed]
    seconds, output, thought = (
        float(np.mean([getattr(reply, field) for reply in replies])) if replies else float("nan")
        for field in ("seconds", "output_tokens", "thought_tokens")
    )
    return ModeScore(
        benchmark=name,
        title=title_of(name, benchmarks),
        mode=results[0].mode,
        score=score,
        method=method,
        figures=figures,
        unpaired=statistics.unpaired_difference(score),
        paired=paired,
        published=published_score(points, stated, results[0].mode, name, title_of(name, benchmarks)),
        differs=stated.differs if stated else "",
        judges=tuple(sorted({result.judge for result in results} - {""})),
        needs_judge=benchmark is not None and benchmark.judged,
        counts=_counts(results),
        seconds=seconds,
        output_tokens=output,
        thought_tokens=thought,
    )


def _scaled(estimate: Estimate, factor: float) -> Estimate:
    scaled = {name: factor * getattr(estimate, name) for name in ("mean", "low", "high", "se")}
    return dataclasses.replace(estimate, **scaled)


def _counts(results: Sequence[Result]) -> Counts:
    return Counts(
        items=len(results),
        errors=sum(bool(result.error) for result in results),
        unparsed=sum(is_unparsed(result) for result in results),
        length=sum(result.finish_reason == "length" for result in results),
        judged=sum(bool(result.judge) for result in results),
        cached=sum(result.cached for result in results),
    )


def is_unparsed(result: Result) -> bool:
    """True for a reply in which the rule found nothing to score."""
    return result.extracted is None and not result.error


def choice(groups: Groups, name: str, benchmarks: Mapping[str, Benchmark]) -> Choice | None:
    """The choices of mode "auto" in a benchmark; None unless items were answered in all three modes."""
    by_mode = {mode: {row.item: row for row in groups.get((name, mode), ()) if row.taken} for mode in MODES}
    common = [row for item, row in by_mode["auto"].items() if item in by_mode["think"] and item in by_mode["nothink"]]
    if not common:
        return None
    auto = values(common)
    think, nothink = (values([by_mode[mode][row.item] for row in common]) for mode in ("think", "nothink"))
    thought = np.array([row.taken == "think" for row in common])
    chosen, other = np.where(thought, think, nothink), np.where(thought, nothink, think)
    names, differ = clusters(common), np.flatnonzero(chosen != other)
    better = [bool(chosen[i] > other[i]) for i in differ]
    return Choice(
        benchmark=name,
        title=title_of(name, benchmarks),
        n=len(common),
        thought=float(thought.mean()),
        at_least_as_good=statistics.proportion_estimate(chosen >= other, names),
        decisive=len(differ),
        better=statistics.proportion_estimate(better, [names[i] for i in differ]) if len(differ) else None,
        auto=100 * float(auto.mean()),
        think=100 * float(think.mean()),
        nothink=100 * float(nothink.mean()),
        best=100 * float(np.maximum(think, nothink).mean()),
        thinking_gain=statistics.paired_test(nothink, think, names),
    )


def thought_bins(results: Sequence[Result]) -> list[ThoughtBin]:
    """Scores by length of the thought, of replies that think, for each mode."""
    found = []
    for mode in MODES:
        rows = [row for row in results if row.mode == mode and row.taken == "think" and row.thought_tokens]
        for first, after in zip(THOUGHT_BINS, [*THOUGHT_BINS[1:], None], strict=True):
            inside = [
                row for row in rows if first <= row.thought_tokens and (after is None or row.thought_tokens < after)
            ]
            if inside:
                score = statistics.proportion_estimate(values(inside), clusters(inside))
                found.append(ThoughtBin(mode, first, None if after is None else after - 1, score))
    return found


def mean_thought(results: Sequence[Result], *, correct: bool, mode: Mode = "think") -> float | None:
    """Mean thought tokens of replies that think and have a full score, or have less; None for none."""
    tokens = [row.thought_tokens for row in results if row.taken == mode and (row.value == 1) == correct]
    return float(np.mean(tokens)) if tokens else None
