"""The comparison of two evaluations item by item."""

import dataclasses
from collections.abc import Mapping, Sequence

from phivision_jax.evaluation import statistics
from phivision_jax.evaluation.benchmark import Benchmark
from phivision_jax.evaluation.report.numbers import clusters, group, title_of, values
from phivision_jax.evaluation.results import Result
from phivision_jax.evaluation.statistics import Paired
from phivision_jax.text.constants import PromptMode


@dataclasses.dataclass(frozen=True)
class Compared:
    """One benchmark in one mode in both runs; differences are this run − the other, from −1 to 1."""

    benchmark: str
    title: str
    mode: PromptMode
    n: int
    """Items that both runs have."""
    ours: float
    """Mean score of this run on them, from 0 to 1."""
    theirs: float
    paired: Paired
    """Run a is the other run, b this one."""
    smallest: float
    """Smallest difference that this comparison can detect."""
    changed: int
    """Items of the same id whose question, images or reference differ; they are left out."""
    unmatched: int
    """Items that only one of the runs has."""


def match(ours: Sequence[Result], theirs: Sequence[Result]) -> dict[tuple[str, str, str], Result]:
    """The other run's row to each row of this run with the same benchmark, item, mode, question, images and record."""
    others = {row.key: row for row in theirs}
    return {row.key: others[row.key] for row in ours if row.key in others and _same_item(row, others[row.key])}


def _same_item(ours: Result, theirs: Result) -> bool:
    return (ours.question, ours.images, ours.record) == (theirs.question, theirs.images, theirs.record)


def compare(ours: Sequence[Result], theirs: Sequence[Result], benchmarks: Mapping[str, Benchmark]) -> list[Compared]:
    """Compare each benchmark and mode that both runs have."""
    matched, found = match(ours, theirs), []
    others = group(theirs)
    for (name, mode), rows in group(ours).items():
        pairs = [(row, matched[row.key]) for row in rows if row.key in matched]
        if not pairs:
            continue
        mine, other = ([pair[side] for pair in pairs] for side in (0, 1))
        paired = statistics.paired_test(values(other), values(mine), clusters(mine))
        common = len({row.key for row in rows} & {row.key for row in others[name, mode]})
        found.append(
            Compared(
                benchmark=name,
                title=title_of(name, benchmarks),
                mode=mode,
                n=len(pairs),
                ours=float(values(mine).mean()),
                theirs=float(values(other).mean()),
                paired=paired,
                smallest=statistics.smallest_difference(paired.difference.se, paired.difference.clusters),
                changed=common - len(pairs),
                unmatched=len(rows) + len(others[name, mode]) - 2 * common,
            )
        )
    return found
