"""The best checkpoint: by which metric, of which steps, and the message when there is no such metric."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from phivision_jax.checkpoint.retention import KeepBest, check_keep_best

VALIDATED = {"loss": 2.0, "validation/loss": 3.0, "validation/token_accuracy": 0.5}


def kept(keep_best, *metrics):
    rule = KeepBest(keep_best, print)
    for step, values in enumerate(metrics):
        rule.add(step, values)
    return rule.should_preserve([SimpleNamespace(step=step) for step in range(len(metrics))], context=None)


def test_keep_best_keeps_highest_or_with_a_minus_lowest():
    three = [{"a": 1.0}, {"a": 3.0}, {"a": 2.0}]
    assert kept("a", *three) == [False, True, False] and kept("-a", *three) == [True, False, False]


def test_keep_best_prefers_the_newest_of_equals():
    assert kept("-a", {"a": 1.0}, {"a": 1.0}, {}) == [False, True, False]


def test_keep_best_ignores_steps_without_the_metric():
    steps = [{"value": 0.0}, {"token_accuracy": 0.1}, {"loss": 5.0}, {"loss": 7.0}, {"loss": float("nan")}]
    assert kept("-loss", *steps) == [False, False, True, False, False]
    assert kept("-loss", {"value": 0.0}, {}) == [False, False] and kept("-loss") == []


def test_misspelt_metric_is_reported_once():
    log = []
    rule = KeepBest("-validation/losss", log.append)
    for step, metrics in ((10, {}), (20, {"loss": 1.0})):
        rule.report_missing(step, metrics)
    assert not log
    for step in (30, 40):
        rule.report_missing(step, VALIDATED)
    assert log == [
        "checkpoint 30 cannot be the best: keep_best asks for validation/losss, and its metrics are validation/loss, "
        "validation/token_accuracy"
    ]
    log.clear()
    KeepBest("vaildation/loss", log.append).report_missing(10, {"loss": 1.0, "elapsed_s": 2.0})
    assert log[0].endswith("its metrics are elapsed_s, loss")


def test_steps_without_validation_are_not_reported():
    log = []
    rule = KeepBest("-validation/loss", log.append)
    for step, metrics in enumerate(({"loss": 1.0}, VALIDATED, {"validation/token_accuracy": 0.5})):
        rule.add(step, metrics)
        rule.report_missing(step, metrics)
    assert not log


VALIDATION = "data.validation_path is empty and data.validation_share is 0"
EVAL = "data.eval_path and eval_benchmarks are empty"


@pytest.mark.parametrize(
    ("keep_best", "validates", "evaluates", "missing"),
    [
        ("-validation/loss", False, True, VALIDATION),
        ("-validation/loss", True, False, ""),
        ("eval/accuracy", True, False, EVAL),
        ("eval/accuracy", False, True, ""),
        ("-loss", False, False, ""),
        ("", False, False, ""),
    ],
)
def test_check_keep_best_refuses_what_is_never_measured(keep_best, validates, evaluates, missing):
    expected = pytest.raises(ValueError, match=f"keep_best={keep_best} .*: {missing}") if missing else nullcontext()
    with expected:
        check_keep_best(keep_best, validates=validates, evaluates=evaluates)
