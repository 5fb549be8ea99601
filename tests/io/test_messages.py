"""Parts of messages."""

from phivision_jax.io import messages
from phivision_jax.io.messages import did_you_mean, differences, first_line


def test_did_you_mean_names_the_nearest_or_all():
    assert did_you_mean("lenght", ["rows", "length"]) == "did you mean 'length'?"
    assert did_you_mean("zzz", (name for name in ("rows", "length"))) == "choose from rows, length"


def test_differences_of_nested_values():
    old = {"a": 1, "stages": [{"epochs": 1}, {"epochs": 2}], "files": [1, 2], "gone": 0, "kind": {"x": 1}}
    new = {"a": 1, "stages": [{"epochs": 1}, {"epochs": 3}], "files": [1], "kind": 5, "new": {"y": 1}}
    assert list(differences(old, new)) == [
        ("stages.1.epochs", 2, 3),
        ("files", [1, 2], [1]),
        ("gone", 0, None),
        ("kind", {"x": 1}, 5),
        ("new", None, {"y": 1}),
    ]
    assert list(differences(old, old)) == []


def test_first_line_is_short():
    assert first_line(ValueError("a b:\nmore")) == "a b" and first_line(KeyError()) == "KeyError"
    line = first_line(ValueError("begin " + "x" * 1000 + " end"))
    assert line.startswith("begin") and line.endswith("end") and len(line) < 310


def test_difference_of_very_long_values_is_short():
    sentence = messages.first_difference({"path": "x" * 200_000}, {"path": ["y" * 200_000] * 9})
    assert sentence.startswith("path is ['yyy") and " there, xxx" in sentence and len(sentence) < 300
