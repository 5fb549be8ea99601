"""Boxes and points on the images of a report."""

from __future__ import annotations

import pytest

from phivision_jax.evaluation.report.marks import RelativeMark, marks_of
from tests.support.evaluation_runs import row

BOX = (0.25, 0.5, 0.5, 0.75)
PIXELS = {"bbox_xywh_px": [160, 200, 160, 100], "image_size": [640, 400]}


@pytest.mark.parametrize("record", [{"bbox_xyxy_norm": list(BOX)}, PIXELS])
def test_reference_is_relative_to_the_image(record):
    assert marks_of(row(record=record)) == [RelativeMark("reference", BOX)]


def test_box_of_an_answer_has_its_label_and_is_marked_once():
    found = marks_of(
        row(record={"bbox_xyxy_norm": BOX}, answer="the cup: [0.1, 0.2, 0.3, 0.4]", extracted=[0.1, 0.2, 0.3, 0.4])
    )
    assert found[1:] == [RelativeMark("answer", (0.1, 0.2, 0.3, 0.4), "the cup")]


def test_understood_point_is_read_in_the_unit_of_its_rule():
    click = row(record=PIXELS, answer="click(x=320, y=100)", extracted=[320, 100])
    assert marks_of(click)[1:] == [RelativeMark("scored", (0.5, 0.25))]
    assert marks_of(row(record={"bbox_xyxy_norm": BOX}, extracted=[320, 100]))[1:] == []  # never guessed


@pytest.mark.parametrize("extracted", [None, "B", [1, 2, 3], ["a", "b"], [float("inf"), 1], [True, None], {"x": 1}])
def test_other_answers_have_no_mark(extracted):
    assert marks_of(row(record={"bbox_xyxy_norm": ["a", 1, 2, 3], "image_size": "x"}, extracted=extracted)) == []
