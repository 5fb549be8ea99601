import pytest

from phivision_jax.evaluation.scoring import exact_match


@pytest.mark.parametrize(
    ("prediction", "reference", "match"),
    [
        ("Circle.", "circle", True),
        (" circle\n", "circle", True),
        ("<think>a square? no, round</think> circle", "circle", True),
        ("<think>circle</think> square", "circle", False),
        ("circles", "circle", False),
        ("", "circle", False),
        ('"Circle."', "circle", True),
        ("“Circle”.", "circle", True),
        ("' Circle '", "circle", True),
        ("`x`", "x", True),
        ("5.", "5", True),
        ("a circle", "circle", False),
    ],
)
def test_exact_match(prediction, reference, match):
    assert exact_match(prediction, reference) is match
    assert exact_match(reference, prediction) is match


@pytest.mark.parametrize(
    "pair",
    [
        "-5 5", "+5 5", "±2 2", "~3 3", "≈3 3", "<5 5", ">5 <5", "5! 5", "5% 50", "50% 50", "5° 5", "$5 5", "€5 $5",
        "5$ 5", "(5) 5", "[5] (5)", "{5} 5", "|5| 5", "1.5 15", ".5 5", "1,5 15", "5.. 5", "1/2 12", "3-4 34", "a+b ab",
        "a*b ab", "5* 5", "x^2 x2", "x_1 x1", "1e5 15", "10:30 1030", "C# C", "C++ C", "F# F", "@a a", "#1 1", "&a a",
        "a\\b ab", "5' 5", '5" 5', "5'6\" 56", "5m 5", "a) a", "no? no", "=5 5", "x; x", "'a a", "\"a' a", "... .",
    ],
)  # fmt: skip
def test_signs_units_and_operators_count(pair):
    one, other = pair.split(" ")
    assert not exact_match(one, other) and not exact_match(other, one)


@pytest.mark.parametrize("mark", [*"?!.-+%$#'\"(", "''", "...", "<think>5</think>?"])
def test_mark_alone_is_not_an_empty_answer(mark):
    assert not exact_match(mark, "") and not exact_match("", mark) and exact_match("", "")


def test_quotation_marks_inside_an_answer_count():
    assert not exact_match("'a' or 'b'", "a' or 'b")
