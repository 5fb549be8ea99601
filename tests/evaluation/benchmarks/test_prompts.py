from __future__ import annotations

import pytest

from phivision_jax.evaluation.benchmarks.prompts import multiple_choice, split_options


@pytest.mark.parametrize(
    "text, options",
    [
        ("(A) red\n(B) light blue\n(C) 3.5", ["red", "light blue", "3.5"]),
        (
            "Options: A: The suitcase is on the book., B: None, C: a, b",
            ["The suitcase is on the book.", "None", "a, b"],
        ),
        ("A. 12; B. 15; C. 20; D. No correct answer", ["12", "15", "20", "No correct answer"]),
        ("A:1\nB:2\nC:A. and B.\nD:4", ["1", "2", "A. and B.", "4"]),
        ("A. only one", []),
        ("no options here", []),
        ("", []),
    ],
)
def test_split_options(text, options):
    assert split_options(text) == dict(zip("ABCDEFGH", options, strict=False))


def test_multiple_choice_is_vlmevalkits_prompt():
    prompt = multiple_choice("What?", {"A": "x", "B": "y"}, hint="look")
    assert prompt == (
        "Hint: look\nQuestion: What?\nOptions:\nA. x\nB. y\nPlease select the correct answer from the options above. \n"
    )
    assert multiple_choice("What?", {}) == "Question: What?\n"
