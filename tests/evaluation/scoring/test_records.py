"""Records without a key, or with another value, are an error that names the key."""

from __future__ import annotations

import pytest

from phivision_jax.evaluation import scoring
from tests.evaluation.scoring.hostile import RECORDS

UNREAD = {
    ("mathvista_prefetch", "answer"),  # of a question with choices
    ("mathvista_prefetch", "answer_type"),
    ("mathvista_prefetch", "precision"),
    ("mathvista_normalize", "answer_type"),
    ("mathvista_normalize", "precision"),
    ("screenspot_point", "image_size"),  # of normalised coordinates
    ("screenspot_bbox", "image_size"),
}
KEYS = [(rule, key) for rule, records in RECORDS.items() for key in records[0] if (rule, key) not in UNREAD]


@pytest.mark.parametrize("rule, key", KEYS)
def test_missing_key_is_named(rule, key):
    record = {name: value for name, value in RECORDS[rule][0].items() if name != key}
    with pytest.raises(KeyError, match=key):
        getattr(scoring, rule)("A", record)


@pytest.mark.parametrize("rule, key", KEYS)
@pytest.mark.parametrize("value", [None, True, b"A"])
def test_value_of_another_type_is_named(rule, key, value):
    with pytest.raises(ValueError, match=key):
        getattr(scoring, rule)("A", RECORDS[rule][0] | {key: value})


@pytest.mark.parametrize(
    "rule, change",
    [
        ("hallusion_yesno", {"answer": "maybe"}),
        ("mathvista_normalize", {"question_type": "open"}),
        ("mathvista_normalize", {"question_type": "free_form", "answer_type": "date"}),
        ("mathvista_normalize", {"question_type": "free_form", "answer_type": "float", "precision": None}),
        ("mathvista_normalize", {"choices": []}),
        ("mathvision_equal", {"answer": "F", "options": ["1", "2"]}),
        ("mcq", {"options": {"a": "red"}}),
        ("mcq", {"options": {}}),
        ("mmmu_mc", {"options": ["x"] * 27}),
        ("screenspot_bbox", {"bbox_xyxy_norm": [0, 0, 1]}),
        ("screenspot_point", {"coordinates": "guessed"}),
        ("screenspot_pixel_click", {"image_size": [0, 100]}),
    ],
)
def test_value_that_makes_no_sense_is_named(rule, change):
    with pytest.raises(ValueError, match=list(change)[-1]):
        getattr(scoring, rule)("1", RECORDS[rule][0] | change)


def test_key_of_a_row_is_named():
    with pytest.raises(KeyError, match="figure_id"):
        scoring.hallusion_groups([{"l2_category": "VD_ocr", "set_id": 0, "question_id": 0, "correct": 1}])
    with pytest.raises(ValueError, match="three_step"):
        scoring.wemath_four_dim([(1, 1, 1)], [(1, 1, 1)])
    with pytest.raises(ValueError, match="two_step"):
        scoring.wemath_four_dim([(1, 2, 1)], [])
    with pytest.raises(ValueError, match="two_step"):
        scoring.wemath_four_dim([], [])
