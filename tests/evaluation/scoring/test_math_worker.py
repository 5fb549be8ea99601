"""Comparison of expressions in a server process that may be late, end or be asked by many threads."""

from __future__ import annotations

import concurrent.futures
import subprocess
import sys
import time

import pytest

from phivision_jax.evaluation.scoring import math_worker, mathvision, mathvision_equal
from phivision_jax.evaluation.scoring.math_worker import MathWorker, expressions_equal

SLOW = ("x^{999}+(x+1)^{999}(x+2)^{999}", "x+\\sqrt{3}")
"""Expressions whose comparison takes seconds."""


@pytest.fixture(scope="module")
def worker():
    worker = MathWorker()
    yield worker
    worker.close()


@pytest.mark.parametrize(
    "one, other, equal",
    [
        ("\\frac{1}{2}", "0.5", True),
        ("2\\sqrt{2}", "\\sqrt{8}", True),
        ("2\\sqrt{2}", "2.83", True),
        ("2\\sqrt{2}", "2.9", False),
        ("x+1", "1+x", True),
        ("(x+1)^2", "x^2+2x+1", True),
        ("x+1", "x+2", False),
        ("(1,2)", "(1,\\frac{4}{2})", True),
        ("(1,2)", "(2,1)", False),
        ("(1,2)", "[1,2]", False),
        ("2^{10}", "1024", True),
        ("\\pi", "3.14", True),
        ("3cm", "3", False),
        ("}{", "}{", False),
    ],
)
def test_expressions(one, other, equal):
    assert expressions_equal(one, other) is equal


@pytest.mark.parametrize(
    "text",
    [
        "9**9**9",
        "9^{9^{9}}",
        "9^9^9",
        "2^{100000}",
        "99999!",
        "9!!",
        "(9!)!",
        "((((((((((1))))))))))",
        "{" * 50 + "}" * 50,
        "1+" * 200,
    ],
)
def test_expression_that_could_take_long_is_not_compared(text, monkeypatch):
    monkeypatch.setattr(math_worker, "_worker", None)
    assert expressions_equal(text, "\\sqrt{2}") is None
    assert expressions_equal("\\sqrt{2}", text) is None


def test_late_comparison_is_given_up_and_the_next_one_answered(worker):
    assert worker.equal("x+1", "1+x") is True
    start = time.monotonic()
    assert worker.equal(*SLOW) is None
    assert time.monotonic() - start < 5
    assert worker.equal("x+1", "1+x") is True


def test_reply_that_comes_too_late_is_not_taken_for_the_next(worker, monkeypatch):
    assert worker.equal("2\\sqrt{2}", "\\sqrt{8}") is True
    monkeypatch.setattr(math_worker, "WAITING", 0.0)
    assert False not in [worker.equal("2\\sqrt{2}", "\\sqrt{8}") for _ in range(5)]
    monkeypatch.undo()
    for _ in range(3):
        assert worker.equal("2\\sqrt{2}", "\\sqrt{7}") is False
        assert worker.equal("2\\sqrt{2}", "\\sqrt{8}") is True


def test_server_that_was_killed_is_started_again(worker):
    assert worker.equal("x+1", "1+x") is True
    worker._process.kill()
    worker._process.wait()
    assert worker.equal(*SLOW) is None  # ends the child, which nothing replaces
    assert worker.equal("x+1", "1+x") is True


def test_threads_take_turns(worker):
    pairs = [("x+1", f"{n % 3}+x") for n in range(60)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda pair: worker.equal(*pair), pairs))
    assert found == [n % 3 == 1 for n in range(60)]


def test_server_ends_with_its_client():
    code = (
        "from phivision_jax.evaluation.scoring import math_worker as m;"
        "print(m.expressions_equal('x+1', '1+x'), m._worker._process.pid)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    equal, pid = done.stdout.split()
    assert equal == "True"
    with pytest.raises(FileNotFoundError):
        open(f"/proc/{pid}/stat").close()


@pytest.mark.parametrize(
    "reply, answer, options, value",
    [
        ("\\boxed{12}", "12", [], 1),
        ("\\boxed{1,000}", "1000", [], 1),
        ("The answer is 0.5.", "\\frac{1}{2}", [], 1),
        ("1/3", "0.33", [], 1),
        ("\\boxed{\\frac{1}{4}}", "0.5", [], 0),
        ("\\boxed{B}", "B", ["1", "2"], 1),
        ("\\boxed{2}", "B", ["1", "2"], 1),
        ("(A)\nbecause", "B", ["1", "2"], 0),
        ("none of these", "12", [], 0),
        ("the area is 12 cm", "12", [], 0),
        ("", "12", [], 0),
    ],
)
def test_plain_answers_need_no_server(reply, answer, options, value, monkeypatch):
    monkeypatch.setattr(mathvision, "expressions_equal", None)
    assert mathvision_equal(reply, {"answer": answer, "options": options}).value == value


def test_expression_that_was_not_compared_is_reported():
    score = mathvision_equal("\\boxed{9^{9^{9}}}", {"answer": "\\sqrt{2}", "options": []})
    assert (score.value, score.reason) == (0, "too complex to compare")
