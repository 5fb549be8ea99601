"""Agreement with the public scorers on the cases that were collected by running them: see ``cases/README.md``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from phivision_jax.evaluation import scoring
from tests.evaluation.scoring.decisions import DECISIONS, decision

CASES = Path(__file__).with_name("cases")
RULES = sorted(path.stem for path in CASES.glob("*.jsonl"))
OF_ONE_REPLY = [rule for rule in RULES if rule not in ("think_strip", "hallusion_groups", "wemath_four_dim")]
NAMES = {
    "IK": "InsufficientKnowledge",
    "IG": "InadequateGeneralization",
    "CM": "CompleteMastery",
    "RM": "RoteMemorization",
    "score": "Score",
}


def cases(rule: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (CASES / f"{rule}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("rule", OF_ONE_REPLY)
def test_rule_agrees_or_differs_by_a_decision(rule):
    score = getattr(scoring, rule)
    right, differences = 0, []
    for case in cases(rule):
        ours = score(case["prediction"], case["record"])
        right += case["public"] == ours.value == 1
        if ours.value != case["public"]:
            differences.append((decision(rule, case, ours), case, ours))
    assert right >= 10
    assert [each for each in differences if each[0] is None] == []
    assert {name for name, _, _ in differences} == DECISIONS.get(rule, {}).keys()


def test_thoughts_are_removed_as_by_lmms_eval():
    for case in cases("think_strip"):
        assert scoring.think_strip(case["prediction"]) == case["public"], case


def test_groups_agree_with_vlmevalkit():
    for case in cases("hallusion_groups"):
        assert scoring.hallusion_groups(case["records"]) == pytest.approx(case["public"])


def test_four_dimensions_agree_with_the_table_of_we_math():
    for case in cases("wemath_four_dim"):
        ours = scoring.wemath_four_dim(case["two_step"], case["three_step"])
        for name, figures in ours.items():
            for key, value in figures.items():
                assert case["public"][f"{NAMES[key]} ({name.title()})"].split()[0] == f"{value:.2%}"


def test_cases_are_small():
    assert sum(path.stat().st_size for path in CASES.iterdir()) < 1_000_000
