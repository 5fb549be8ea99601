"""Limits on what ``tests/support/prose.py`` counts: the countable rules of CONTRIBUTING.md."""

from __future__ import annotations

import pytest

from tests.support import prose


def test_docstrings_have_a_subject_or_a_verb():
    """At most one in a hundred may start with "What", "Of", "Whether" and the like."""
    counted = [prose.headless(path) for path in prose.files() if path.suffix == ".py"]
    total, found = sum(n for n, _ in counted), [f for _, more in counted for f in more]
    assert total > 1000 and len(found) <= total / 100, found


def test_words_with_a_standard_term_are_not_used():
    assert [finding for path in prose.files() for finding in prose.words(path)] == []


@pytest.mark.parametrize(
    "text, problems",
    [
        ('def f():\n    """Of the order of examples."""', 1),
        ('def f():\n    """Order of the examples, drawn anew."""', 2),
        ('raise ValueError("the bucket says no")', 1),
        ("# whoever reads this is told", 2),
        ("made = 1\ndef together(there): pass", 3),
        ('def f():\n    """Return the order of the examples."""', 0),
    ],
)
def test_planted_problem_is_found(tmp_path, text, problems):
    file = tmp_path / "planted.py"
    file.write_text(text)
    assert len(prose.headless(file)[1]) + len(prose.words(file)) == problems
