"""Rules where their behaviour is a decision, or not compared with a public scorer."""

from __future__ import annotations

import pytest

from phivision_jax.evaluation import scoring
from phivision_jax.evaluation.scoring import UNPARSED
from phivision_jax.evaluation.scoring.screenspot import intersection_over_union

BOX = {"bbox_xyxy_norm": [0.1, 0.2, 0.3, 0.4], "image_size": [1000, 500]}


@pytest.mark.parametrize("rule, record", [("mmmu_mc", {"options": ["x", "y"], "answer": "A"}), ("mcq", None)])
def test_nothing_is_guessed(rule, record):
    record = record or {"options": {"A": "x", "B": "y"}, "answer": "A"}
    assert {getattr(scoring, rule)("I do not know at all.", record) for _ in range(20)} == {UNPARSED}


@pytest.mark.parametrize(
    "reply, value, point",
    [
        ("[0.15, 0.25]", 1, [0.15, 0.25]),
        ("[0.1, 0.2, 0.3, 0.4]", 1, [0.2, 0.3]),
        ("[0.05, 0.2, 0.9, 0.4]", 0, [0.475, 0.3]),
        ("The element is at [0.1, 0.2, 0.3, 0.4].", 1, [0.2, 0.3]),
        ("0.1, 0.2, 0.3, 0.4", 1, [0.2, 0.3]),
        ("[150, 150]", 0, [150, 150]),
    ],
)
def test_point_is_normalised(reply, value, point):
    score = scoring.screenspot_point(reply, BOX)
    assert score.value == value and score.extracted == pytest.approx(point)


def test_point_in_pixels_where_the_source_has_pixels():
    pixels = BOX | {"coordinates": "pixels"}
    assert scoring.screenspot_point("[150, 150]", pixels).value == 1
    assert scoring.screenspot_point("[0.15, 0.25]", pixels).value == 0


def test_box_by_its_centre_with_its_overlap():
    score = scoring.screenspot_bbox("[0.1, 0.2, 0.3, 0.3]", BOX)
    assert (score.value, score.extracted) == (1, [0.1, 0.2, 0.3, 0.3])
    assert score.reason == "centred in the box, IoU 0.500"
    assert scoring.screenspot_bbox("[100, 200, 300, 400]", BOX).value == 0
    assert intersection_over_union([0, 0, 0, 0], [0, 0, 0, 0]) == 0
    assert intersection_over_union([1, 1, 0, 0], [0, 0, 1, 1]) == 0


def test_click_outside_of_the_last_pixel():
    record = {"bbox_xywh_px": [10, 20, 5, 5], "image_size": [100, 100]}
    values = [scoring.screenspot_pixel_click(f"click(x={x}, y=22)", record).value for x in (9, 10, 14, 15)]
    assert values == [0, 1, 1, 0]


def test_float_precision_of_mathvista_is_used():
    record = {"question_type": "free_form", "answer_type": "float", "choices": None, "precision": 2.0, "answer": "1.45"}
    assert scoring.mathvista_normalize("1.4501", record).value == 1
    assert scoring.mathvista_normalize("1.46", record).value == 0


def test_number_that_equals_the_answer_needs_no_judge():
    record = {"question_type": "free_form", "choices": None, "answer": "0", "answer_option": None}
    assert scoring.mathvista_prefetch("0", record).value == 1
    assert scoring.mathvista_prefetch("It is 0", record) == UNPARSED
    assert scoring.mathvista_prefetch("0.0", record | {"answer_type": "float"}).value == 1
    assert scoring.mathvista_prefetch("0", record | {"answer_type": "list"}) == UNPARSED


def test_figures_over_no_rows():
    assert scoring.hallusion_groups([]) == {"aAcc": 0, "fAcc": 0, "qAcc": 0}


def test_dimensions_of_one_chain_each():
    figures = scoring.wemath_four_dim([(1, 1, 1), (1, 1, 0), (1, 0, 0)], [(1, 0, 1, 1), (0, 0, 0, 1)])
    assert figures["strict"] == pytest.approx({"score": 0.3, "IK": 0.2, "IG": 0.2, "CM": 0.2, "RM": 2 / 3})
    assert figures["loose"] == pytest.approx({"score": 0.5, "IK": 0.2, "IG": 0.2, "CM": 0.4, "RM": 1 / 3})


@pytest.mark.parametrize(
    "text, left",
    [
        ("<think>a</think> b", "b"),
        ("a</think>b", "b"),
        ("<think>a", "<think>a"),
        ("<analysis>a</analysis>b", "b"),
        ("<think>a</think>b<think>c</think>d", "bd"),
        ("<thi<think>a</think>nk>b</think>c", "c"),
        ("<THINK>a</THINK>", "<THINK>a</THINK>"),
    ],
)
def test_thoughts(text, left):
    assert scoring.think_strip(text) == left


def test_every_rule_is_offered():
    assert all(callable(getattr(scoring, name)) for name in scoring.__all__ if name != "UNPARSED")
