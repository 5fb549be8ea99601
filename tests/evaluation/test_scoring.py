import pytest
from PIL import Image

from phivision_jax.evaluation.html_report import make_report, picture_with_answer, write_report
from phivision_jax.evaluation.runner import Answer, EvalResult
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
    ],
)
def test_exact_match(prediction, reference, match):
    assert exact_match(prediction, reference) is match


def test_report(tmp_path):
    answers = [Answer(str(i), "general", "nothink", "q", "a", "a" if i else "b", bool(i)) for i in range(4)]
    report = make_report(EvalResult(tuple(answers)), checkpoint="c", data="d", mode="auto")
    assert report.accuracy == 0.75 and report.by_task == {"nothink/general": (0.75, 4)}
    write_report(report, tmp_path / "out")
    assert len((tmp_path / "out" / "answers.jsonl").read_text().splitlines()) == 4


def test_the_picture_is_a_picture(tmp_path):
    """Dollar signs are money, not mathematics; an empty answer says so."""
    for answer in ("It costs $5 and $6_x$.", ""):
        picture_with_answer(Image.new("RGB", (8, 8), "red"), "How much? " * 12, answer, tmp_path / "a.png")
        assert Image.open(tmp_path / "a.png").size[0] > 300
