"""Figures of an evaluation per benchmark and mode, and a table of them for the terminal."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from statistics import fmean

from phivision_jax.evaluation.benchmark import Benchmark, Item, Published, Scored
from phivision_jax.evaluation.results import Result
from phivision_jax.evaluation.scoring import Score
from phivision_jax.io.messages import shorten

RULE_ONLY = "rule only"
"""The judge of a score that is published with one, but was measured without."""
_NAMED = 3
"""Errors that are named."""


@dataclasses.dataclass(frozen=True)
class Summary:
    """The figures of one benchmark in one mode."""

    benchmark: str
    title: str
    mode: str
    items: int
    failed: int
    """Items without a reply, which count as wrong."""
    figures: Mapping[str, float]
    """Those of ``Benchmark.summary``."""
    published: Published | None
    judge: str
    """The judge of the score, ``RULE_ONLY``, or "" for a benchmark that needs none."""
    thinks: float
    """Share of replies with a thought."""
    seconds: float
    """Mean time of a reply, from the beginning of the prefill to the last token."""
    output_tokens: float
    """Mean number of generated tokens."""


def summarize(results: Sequence[Result], benchmarks: Mapping[str, Benchmark]) -> list[Summary]:
    """The summaries of all benchmarks and modes, in the order of ``benchmarks``."""
    groups = collections.defaultdict[tuple[str, str], list[Result]](list)
    for result in results:
        groups[result.benchmark, result.mode].append(result)
    order = list(benchmarks)
    keys = sorted(groups, key=lambda key: (order.index(key[0]), ("auto", "think", "nothink").index(key[1])))
    return [_summary(benchmarks[name], mode, groups[name, mode]) for name, mode in keys]


def _summary(benchmark: Benchmark, mode: str, results: Sequence[Result]) -> Summary:
    replies = [result for result in results if not result.failed] or [*results]
    judges = sorted({result.judge for result in results} - {""})
    return Summary(
        benchmark=benchmark.name,
        title=benchmark.title,
        mode=mode,
        items=len(results),
        failed=sum(result.failed for result in results),
        figures=benchmark.summary([scored(result) for result in results]),
        published=benchmark.published,
        judge=", ".join(judges) or (RULE_ONLY if benchmark.judged else ""),
        thinks=fmean(result.taken == "think" for result in replies),
        seconds=fmean(result.seconds for result in replies),
        output_tokens=fmean(result.output_tokens for result in replies),
    )


def scored(result: Result) -> Scored:
    """A result as ``Benchmark.summary`` reads it, without the bytes of images."""
    item = Item(result.item, result.question, (), result.record, result.groups, result.cluster)
    return Scored(item, Score(result.value, result.extracted, result.reason))


def failures(results: Sequence[Result]) -> list[str]:
    """One line per benchmark with requests or judgements that failed: their number, and their most frequent errors."""
    lines = []
    groups = collections.defaultdict[str, list[Result]](list)
    for result in results:
        groups[result.benchmark].append(result)
    for name, group in groups.items():
        if failed := [result for result in group if result.error]:
            counts = collections.Counter(result.error for result in failed)
            first = {result.error: f"{shorten(result.item)} ({result.mode})" for result in reversed(failed)}
            named = [
                f"{first[error]}{f' and {n - 1:,} more' * (n > 1)}: {shorten(error, 200)}"
                for error, n in counts.most_common(_NAMED)
            ]
            lines.append(f"{name}: {len(failed):,} of {len(group):,} failed, as {'; '.join(named)}")
    return lines


def print_summaries(title: str, summaries: Sequence[Summary]) -> None:
    """Print a table with a line per benchmark and mode."""
    from phivision_jax.io import html  # with matplotlib, which training need not load

    rows = [
        (
            each.title,
            each.mode,
            f"{each.figures['score']:.1f}" + f" ({each.judge})" * bool(each.judge),
            f"{each.published.value:.1f}" if each.published else "–",
            f"{each.items:,}",
            f"{each.seconds:.3g}",
            f"{each.output_tokens:,.1f}",
        )
        for each in summaries
    ]
    header = ("benchmark", "mode", "score", "published", "items", "seconds", "tokens")
    html.print_sections([html.Section(title, table=html.Table(header, rows, names=2))])
