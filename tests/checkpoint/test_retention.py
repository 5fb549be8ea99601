"""Which checkpoint is the best: by which number, of which steps, and what is said when there is no such number."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from phivision_jax.checkpoint import retention
from phivision_jax.checkpoint.retention import Best
from phivision_jax.training.run_config import DataConfig, RunConfig

VALIDATED = {"loss": 2.0, "validation/loss": 3.0, "validation/token_accuracy": 0.5}


def kept(keep_best, *stored):
    steps = [SimpleNamespace(metrics=metrics) for metrics in stored]
    return Best(keep_best, print).should_preserve(steps, context=None)


def test_the_highest_or_with_a_minus_the_lowest_and_of_equals_the_newest():
    three = [{"a": 1.0}, {"a": 3.0}, {"a": 2.0}]
    assert kept("a", *three) == [False, True, False] and kept("-a", *three) == [True, False, False]
    assert kept("-a", {"a": 1.0}, {"a": 1.0}, None) == [False, True, False]


def test_what_was_rated_by_another_metric_is_not_rated():
    """0.0 of "value", as it was once stored, would be the lowest loss there is."""
    steps = [{"value": 0.0}, {"token_accuracy": 0.1}, {"loss": 5.0}, {"loss": 7.0}]
    assert kept("-loss", *steps) == [False, False, True, False]
    assert kept("-loss", {"value": 0.0}, None) == [False, False] and kept("-loss") == []


def test_a_misspelt_metric_is_said_once_with_those_that_there_are():
    said = []
    rated = Best("-validation/losss", said.append)
    assert rated.rating(10, {}) is None and rated.rating(20, {"loss": 1.0}) is None and not said
    assert rated.rating(30, VALIDATED) is None and rated.rating(40, VALIDATED) is None
    assert said == [
        "checkpoint 30 cannot be the best: keep_best asks for validation/losss, and its metrics are validation/loss, "
        "validation/token_accuracy"
    ]
    said.clear()
    Best("vaildation/loss", said.append).rating(10, {"loss": 1.0, "elapsed_s": 2.0})
    assert said[0].endswith("its metrics are elapsed_s, loss")


def test_a_step_that_was_not_validated_is_no_reason_to_speak():
    said = []
    rated = Best("-validation/loss", said.append)
    assert rated.rating(10, {"loss": 1.0}) is None
    assert rated.rating(20, VALIDATED) == {"validation/loss": 3.0}
    assert rated.rating(30, VALIDATED | {"validation/loss": float("nan")}) is None
    assert rated.rating(40, {"validation/token_accuracy": 0.5}) is None  # once there, it is no mistake
    assert not said


VALIDATION, EVAL = "data.validation_path is empty and data.validation_share 0", "data.eval_path is empty"


@pytest.mark.parametrize(
    ("keep_best", "data", "missing"),
    [
        ("-validation/loss", {"eval_path": "a"}, VALIDATION),
        ("-validation/loss", {"validation_path": "a"}, ""),
        ("-validation/loss", {"validation_share": 0.1}, ""),
        ("eval/accuracy", {"validation_share": 0.1}, EVAL),
        ("eval/accuracy", {"eval_path": "a"}, ""),
        ("-loss", {}, ""),
        ("", {}, ""),
    ],
)
def test_what_is_never_measured_is_refused(keep_best, data, missing):
    cfg = RunConfig(keep_best=keep_best, data=DataConfig(**data))
    with pytest.raises(ValueError, match=f"keep_best={keep_best} .*: {missing}") if missing else nullcontext():
        retention.check(cfg)
