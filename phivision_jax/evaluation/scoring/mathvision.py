"""MathVision: the answer in a reply, and mathematical equality."""

import itertools
import re
from collections.abc import Mapping
from typing import Any

from phivision_jax.evaluation.scoring.math_worker import LONGEST_EXPRESSION, expressions_equal
from phivision_jax.evaluation.scoring.record import text_of, texts_of
from phivision_jax.evaluation.scoring.score import Score
from phivision_jax.evaluation.scoring.thoughts import answer_of

_PHRASES = tuple(
    f"{the} {rest}"
    for rest in ("final answer is", "answer is", "correct answer is", "answer should be")
    for the in ("the", "The")
)
_PLAIN_NUMBER = re.compile(r"[+-]?(?:\d{1,300}|\d{1,3}(?:,\d{3}){1,99})(?:\.\d{0,300})?|[+-]?\.\d{1,300}")
_PLAIN_FRACTION = re.compile(r"([+-]?)\\frac\{(-?\d{1,99})\}\{(-?\d{1,99})\}|([+-]?\d{1,99})/(\d{1,99})")
_MATHEMATICS = re.compile(r"[\d\\+*/^=]")

# (removed or replaced, by): of an extracted answer in lower case, in this order.
_CLEANING = (
    *((" ", ""), ("\\,", ""), ("∞", "\\infty"), ("+\\infty", "\\infty"), ("\\\\", "\\"), ("\n", ""), ("\\text", "")),
    *(("\\mbox", ""), ("bmatrix", "pmatrix"), ("\\left", ""), ("\\right", ""), ("^{\\circ}", ""), ("^\\circ", "")),
    *(("{m}^3", ""), ("m^3", ""), ("{units}", ""), ("units", ""), ("{km}", ""), ("km", ""), ("\\!", "")),
    *(("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"), ("\\left", ""), ("\\right", ""), ("^{\\circ}", "")),
    *(("^\\circ", ""), ("\\$", ""), ("$", "")),
)


def mathvision_equal(prediction: str, record: Mapping[str, Any]) -> Score:
    """Extract an answer and compare it with a letter, the text of an option or an expression, as lmms-eval.

    The answer is a letter at the end or the start, what follows "is", what follows a phrase such as "the answer is",
    or the last ``\\boxed{…}``; LaTeX is cleaned. It is right if it is the answer, or the text of the option that the
    answer names: as a text, as a number up to two decimals, or as an expression that math-verify finds equal.
    lmms-eval evaluates expressions as Python instead, and knows no variables.

    Args:
      prediction: The reply.
      record: ``answer``: a letter if there are options, else a text; ``options``: a list of texts, which may be empty.

    Raises:
      KeyError, ValueError: for a key that is missing or has another value, naming it.
    """
    answer = text_of(record, "answer")
    references = [answer]
    if not isinstance(record["options"], list | tuple):
        raise ValueError(f"options: expected a list, found {type(record['options']).__name__}")
    if record["options"]:
        options = texts_of(record, "options")
        index = ord(answer) - ord("A") if len(answer) == 1 else -1
        if not 0 <= index < len(options):
            raise ValueError(f"answer: expected the letter of one of {len(options)} options, found {answer!r:.100}")
        references.append(options[index])
    extracted = _extracted(answer_of(prediction))
    known = True
    for reference in references:
        equal = _equal(reference.lower(), extracted)
        if equal:
            return Score(1.0, extracted, "equal to the answer")
        known &= equal is not None
    return Score(0.0, extracted, "not equal to the answer" if known else "too complex to compare")


def _equal(reference: str, answer: str) -> bool | None:
    reference, answer = reference.strip(), answer.strip()
    if not reference or not answer:
        return False
    if reference == answer:
        return True
    reference, answer = _without_brackets(reference), _without_brackets(answer)
    numbers = [_plain_number(each) for each in (reference, answer)]
    if None not in numbers:
        return numbers[0] == numbers[1]
    if not (_MATHEMATICS.search(reference) and _MATHEMATICS.search(answer)):
        return False  # words: math-verify reads them as products of letters, in any order
    if _letters(reference) != _letters(answer):
        return False  # a sentence or a unit on one side
    return expressions_equal(reference, answer)


def _letters(text: str) -> set[str]:
    """The letters of a text that are not in LaTeX commands: its variables, or its words."""
    return set(re.findall(r"[^\W\d_]", re.sub(r"\\[a-z]+", "", text)))


def _without_brackets(text: str) -> str:
    """Remove dollar signs, and brackets around one expression: parsers refuse "{12}", and are slow on "(12)"."""
    text = text.strip("$ ")
    while len(text) <= LONGEST_EXPRESSION:
        if text[:1] + text[-1:] != "{}" and (text[:1] + text[-1:] != "()" or "," in text):
            break
        depths = list(itertools.accumulate((each in "{(") - (each in "})") for each in text))
        if 0 in depths[:-1]:  # as in "(1)(2)"
            break
        text = text[1:-1]
    return text


def _plain_number(text: str) -> int | float | None:
    """The value of a number or a fraction of integers, up to two decimals; None for another text."""
    if _PLAIN_NUMBER.fullmatch(text):
        text = text.replace(",", "")
        return round(float(text), 2) if "." in text else int(text)
    if fraction := _PLAIN_FRACTION.fullmatch(text):
        above, below = int(fraction[2] or fraction[4]), int(fraction[3] or fraction[5])
        return round((-above if fraction[1] == "-" else above) / below, 2) if below else None
    return None


def _extracted(reply: str) -> str:
    """The answer of a reply, in lower case."""
    for letter in "ABCDE":
        at_start = (f"{letter}\n", f"({letter})\n", f"({letter}) {letter}\n")
        if reply.endswith((f" {letter}.", f" ({letter}).")) or reply.startswith(at_start):
            reply = letter
    last = reply.rpartition("is ")[2].rstrip(".")
    if _is_float(last):
        reply = last
    boxes = reply.count("oxed{")
    if not boxes:
        for phrase in _PHRASES:
            _, found, tail = reply.rpartition(phrase)
            reply = tail.strip()
            if found:
                reply = reply.partition("\n")[0].partition(". ")[0]
    elif boxes > 1:
        reply = "\\boxed{" + reply.rpartition("oxed{")[2]
    answer = _cleaned(_unboxed(reply.lower().replace("{}", "")))
    for pair in ("()", "{}"):
        for letter in "abcde":
            answer = answer.replace(f"{pair[0]}{letter}{pair[1]}", letter)
    return answer.rstrip(".").lstrip(":").strip()


def _is_float(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _unboxed(text: str) -> str:
    """The text between the first "oxed{" and the last "}", or all; then up to a "}" that closes nothing."""
    _, box, inside = text.partition("oxed{")
    if box and "}" in inside:
        text = inside.rpartition("}")[0]
    before, closing, _ = text.partition("}")
    return before if closing and "{" not in before else text


def _cleaned(text: str) -> str:
    """Remove and unify LaTeX of an answer; the result is the right side of an equation."""
    text = text.rpartition("=")[2].rpartition("\\approx")[2]
    for old, new in _CLEANING:
        text = text.replace(old, new)
    text = text.replace("\\%", "").replace("{.", "{0.")
    if text.startswith("."):
        text = f"0{text}"
    if "sqrt" in text:
        first, *rest = text.split("\\sqrt")
        rest = [f"{{{each[0]}}}{each[1:]}" if each and not each.startswith("{") else each for each in rest]
        text = _braced_fractions("\\sqrt".join([first, *rest]))
    if text == "0.5":
        return r"\frac{1}{2}"
    fraction = re.fullmatch(r"(0|-?[1-9][0-9]{0,99})/(0|-?[1-9][0-9]{0,99})", text)
    return rf"\frac{{{fraction[1]}}}{{{fraction[2]}}}" if fraction else text


def _braced_fractions(text: str) -> str:
    r"""Braces around the numerator and denominator of ``\frac12``; the text as it is if one is missing."""
    first, *rest = text.split("\\frac")
    for index, piece in enumerate(rest):
        if not piece.startswith("{"):
            if len(piece) < 2:
                return text
            denominator = piece[1] if piece[1] == "{" else f"{{{piece[1]}}}"
            rest[index] = f"{{{piece[0]}}}{denominator}{piece[2:]}"
    return "\\frac".join([first, *rest])
