"""The numbers of a report, by hand."""

from __future__ import annotations

import math

import pytest

from phivision_jax.evaluation.report import numbers, tables
from phivision_jax.evaluation.report.comparison import compare
from phivision_jax.evaluation.report.figures import Candidate, mean_candidates, pareto
from phivision_jax.evaluation.report.published import MODEL, Point, published_points, published_score
from tests.support.evaluation_runs import BENCHMARKS, Pairs, row


def test_mode_score_counts_errors_as_wrong_and_leaves_them_out_of_the_cost():
    rows = [
        row(item="1", thought_tokens=30, decode=0.9),
        row(item="2", value=0.0, extracted=None, finish_reason="length", decode=1.9, cached=True),
        row(
            item="3", value=0.0, extracted=None, finish_reason="error", error="no", taken=None, prefill=0.0, decode=0.0
        ),
    ]
    found = numbers.mode_score(rows, BENCHMARKS, [])
    assert found.score.mean == pytest.approx(100 / 3) and found.method == "mean" and found.title == "ChartQA"
    assert found.counts == numbers.Counts(items=3, errors=1, unparsed=1, length=1, judged=0, cached=1)
    assert (found.seconds, found.output_tokens, found.thought_tokens) == pytest.approx((1.5, 19, 15))
    assert found.published is None and found.paired is not None  # the stated figure is of mode "auto"
    assert numbers.mode_score([row(mode="auto")], BENCHMARKS, []).published == 83.3


def test_mode_score_of_failures_only():
    found = numbers.mode_score([row(finish_reason="error", error="no", value=0.0, extracted=None)], {}, [])
    assert math.isnan(found.seconds) and (found.score.mean, found.score.low, found.score.high) == (0, 0, 100)


def test_score_that_is_no_mean_has_the_interval_of_a_jackknife():
    rows = [row(benchmark="hallusion", item=f"{i}", cluster=f"{i // 2}", value=float(i % 4 != 0)) for i in range(40)]
    found = numbers.mode_score(rows, BENCHMARKS, [])
    assert found.score.mean == 50 and found.figures == {"aAcc": 75} and found.method == "jackknife"
    assert found.paired is None and found.score.low < 50 < found.score.high
    assert found.score.se == pytest.approx(100 * (0.25 / 19) ** 0.5)  # of 20 clusters that are right or wrong
    assert found.needs_judge is Pairs.judged


def test_published_score_is_that_of_the_mode():
    points = [
        Point(f"{MODEL}, think", "Chart-QA", 82.9, None, None, "s"),
        Point("Other", "ChartQA", 99, None, None, "s"),
    ]
    stated = BENCHMARKS["chartqa"].published
    assert published_score(points, stated, "think", "chartqa") == 82.9
    assert published_score(points, stated, "auto", "chartqa") == 83.3
    assert published_score(points, stated, "nothink", "chartqa") is None


def test_choice_by_hand():
    """Items a to d: auto thinks on a and b. a: only think is right; b: only nothink; c: both; d: only nothink."""
    scores = {"a": (1, 0), "b": (0, 1), "c": (1, 1), "d": (0, 1)}
    rows = []
    for item, (think, nothink) in scores.items():
        taken = "think" if item in "ab" else "nothink"
        rows.append(row(item=item, mode="auto", taken=taken, value=float(think if taken == "think" else nothink)))
        rows += [row(item=item, mode="think", taken="think", value=float(think)), row(item=item, value=float(nothink))]
    rows.append(row(item="e", mode="auto", taken="think"))  # in no other mode
    found = numbers.choice(numbers.group(rows), "chartqa", BENCHMARKS)
    assert found is not None and (found.n, found.thought, found.decisive) == (4, 0.5, 3)
    assert (
        found.at_least_as_good.mean == 0.75 and found.better is not None and found.better.mean == pytest.approx(2 / 3)
    )
    assert (found.auto, found.think, found.nothink, found.best) == (75, 50, 75, 100)
    assert found.thinking_gain.difference.mean == -0.25 and found.thinking_gain.only_a == 2


def test_choice_needs_all_three_modes():
    assert numbers.choice(numbers.group([row(), row(mode="think", taken="think")]), "chartqa", {}) is None


def test_thoughts_are_binned_by_length_and_mode():
    rows = [
        row(item=f"{n}", mode="think", taken="think", thought_tokens=n, value=float(n < 200))
        for n in (1, 128, 129, 5000)
    ]
    found = numbers.thought_bins([*rows, row()])
    assert [(b.first, b.last, b.score.n, b.score.mean) for b in found] == [
        (1, 128, 2, 1),
        (129, 256, 1, 1),
        (4097, None, 1, 0),
    ]
    assert numbers.mean_thought(rows, correct=True) == 86 and numbers.mean_thought([row()], correct=True) is None


@pytest.mark.parametrize("points, text", [(3.14, "3.1"), (0.0, "–"), (None, "–"), (math.inf, "–"), (371.0, "> 100")])
def test_smallest_difference_is_shown_where_it_is_known(points, text):
    assert tables.smallest(points) == text


def test_pareto_frontier_by_hand():
    points = [
        Candidate(1, 50, "a"),
        Candidate(2, 40, "b"),
        Candidate(3, 60, "c"),
        Candidate(3, 55, "d"),
        Candidate(4, 60, "e"),
    ]
    assert [point.label for point in pareto(points)] == ["a", "c"]


def test_mean_over_benchmarks_needs_all_modes_in_each():
    rows = [row(), row(mode="think", taken="think", decode=3.9), row(benchmark="other", value=0.0)]
    scores = [numbers.mode_score(group, {}, []) for group in numbers.group(rows).values()]
    assert mean_candidates(scores, "seconds") == [
        Candidate(4.0, 100, "think"),
        Candidate(pytest.approx(0.3), 100, "nothink"),
    ]


def test_comparison_by_hand():
    ours = [row(item=f"{i}", value=float(i < 3)) for i in range(6)]
    theirs = [row(item=f"{i}", value=float(i == 5)) for i in range(1, 7)]
    theirs[2] = row(item="3", question="Another question?")
    (found,) = compare(ours, theirs, BENCHMARKS)
    assert (found.n, found.changed, found.unmatched) == (4, 1, 2) and (found.ours, found.theirs) == (0.5, 0.25)
    assert (found.paired.only_a, found.paired.only_b, found.paired.equal) == (1, 2, 1)
    assert found.paired.difference.mean == 0.25 and found.smallest > 0.25


def test_every_published_point_has_a_source():
    points = published_points()
    assert len(points) > 20 and all(0 < point.accuracy < 100 and len(point.source) > 5 for point in points)


@pytest.mark.parametrize(
    "text, problem",
    [
        ("model,benchmark\na,b\n", "columns must be"),
        ("model,benchmark,accuracy,seconds,tokens,source\na,b,1,,,\n", ":2: a point needs"),
        ("model,benchmark,accuracy,seconds,tokens,source\na,b,1,fast,,s\n", ":2: could not convert"),
    ],
)
def test_published_points_name_the_line_of_a_mistake(tmp_path, text, problem):
    (tmp_path / "points.csv").write_text(text)
    with pytest.raises(ValueError, match=problem):
        published_points(tmp_path / "points.csv")
