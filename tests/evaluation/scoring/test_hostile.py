"""Rules on replies that are made to break or to slow down a parser."""

from __future__ import annotations

import dataclasses
import json
import random
import time

import pytest

from phivision_jax.evaluation import scoring
from tests.evaluation.scoring import hostile

LIMIT = 0.05
"""Seconds that a rule may compute."""


def check(rule: str, count: int, large: int) -> float:
    """Score ``count`` replies, each of the last ``large`` of 1 MB, and return the longest time of computation."""
    score = getattr(scoring, rule)
    rng = random.Random(rule)
    records = hostile.RECORDS[rule]
    score("", records[0])
    longest = 0.0
    for index in range(count):
        prediction = hostile.reply(rng, index >= count - large)
        start = time.process_time()
        result = score(prediction, records[index % len(records)])
        longest = max(longest, time.process_time() - start)
        assert 0 <= result.value <= 1 and result.reason, prediction[:200]
        json.dumps(dataclasses.asdict(result), allow_nan=False)
    return longest


@pytest.mark.parametrize("rule", hostile.RECORDS)
def test_rule_scores_any_reply(rule):
    check(rule, 500, large=4)


@pytest.mark.slow
@pytest.mark.parametrize("rule", hostile.RECORDS)
def test_rule_scores_ten_thousand_replies_in_time(rule):
    assert check(rule, 10_000, large=100) < LIMIT


def test_thoughts_of_any_reply_are_removed():
    rng = random.Random(0)
    for index in range(500):
        prediction = hostile.reply(rng, index >= 490)
        start = time.process_time()
        assert len(scoring.think_strip(prediction)) <= len(prediction)
        assert time.process_time() - start < LIMIT


@pytest.mark.parametrize("unit", ["<think>", "<think></think>", "<th", "<think></th", "<analysis>x</analysis>ink>"])
def test_many_thoughts_are_removed_in_linear_time(unit):
    start = time.process_time()
    scoring.think_strip(unit * (hostile.LARGE // len(unit)) + "</think>")
    assert time.process_time() - start < 1
