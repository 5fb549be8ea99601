"""Letters of options by the rules of lmms-eval, which differ from task to task."""

import re
import string
from collections.abc import Mapping
from typing import Any

from phivision_jax.evaluation.scoring.record import text_of
from phivision_jax.evaluation.scoring.score import UNPARSED, Score, compared
from phivision_jax.evaluation.scoring.thoughts import answer_of

PHRASES = (
    *("the answer is", "answer is", "the correct answer is", "correct answer is", "the best answer is"),
    *("best answer is", "the correct option is", "correct option is", "the best option is", "best option is"),
    *("the choice is", "choice is", "the correct choice is", "correct choice is", "i choose", "i select", "i pick"),
    *("my answer is", "my choice is"),
    *("옵션", "정답은", "답은", "답:"),
    *("答案是", "答案为", "选"),
    "答えは",
)
"""Phrases before the letter in replies to MMStar."""
_PUNCTUATION = str.maketrans("", "", string.punctuation)
# In the order in which lmms-eval tries them on an upper-case reply to V*Bench; the first that matches counts.
_VSTAR = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"^([A-D])",
        r"(?:ANSWER|CHOICE|OPTION)(?:\s+IS)?[\s:]+([A-D])",
        r"\(([A-D])\)",
        r"([A-D])\s*[.)\]]",
        r"(?:^|\s)([A-D])(?:\s|$)",
    )
)


def ai2d_lmms(prediction: str, record: Mapping[str, Any]) -> Score:
    """Compare the reply with a letter, as the task "ai2d" of lmms-eval.

    A letter with a full stop at the start is the answer; otherwise the complete reply is, up to case and punctuation,
    so that a sentence is wrong.

    Args:
      prediction: The reply.
      record: ``answer``: a letter.

    Raises:
      KeyError, ValueError: for a record without a usable ``answer``.
    """
    reply = answer_of(prediction)
    letter = re.match(r"\s*([A-Z])\.", reply)
    extracted = letter[1] if letter else reply
    return compared(_plain(extracted) == _plain(text_of(record, "answer")), extracted)


def mmstar_lmms(prediction: str, record: Mapping[str, Any]) -> Score:
    """Find one of the letters A to D, as ``extract_mcq_answer`` of lmms-eval in its task "mmstar".

    Forms in order of priority: a letter at the start, at the end, after a phrase such as "the answer is", "(A)", "A.",
    "A:", "A)", "A " and any letter. Within a form the last place counts.

    Args:
      prediction: The reply.
      record: ``answer``: a letter.

    Raises:
      KeyError, ValueError: for a record without a usable ``answer``.
    """
    return _letter(_mmstar_letter(answer_of(prediction)), record)


def vstar_lmms(prediction: str, record: Mapping[str, Any]) -> Score:
    """Find one of the letters A to D, as ``extract_answer_letter`` of lmms-eval in its task "vstar_bench".

    The reply is read in upper case, and the first form that matches counts: a letter at the start, even of a word;
    "ANSWER IS A"; "(A)"; "A." or "A)"; "A" between white space; the only letter of A to D.

    Args:
      prediction: The reply.
      record: ``answer``: a letter.

    Raises:
      KeyError, ValueError: for a record without a usable ``answer``.
    """
    reply = answer_of(prediction).strip().upper()
    for pattern in _VSTAR:
        if match := pattern.search(reply):
            return _letter(match[1].upper(), record)
    contained = [letter for letter in "ABCD" if letter in reply]
    return _letter(contained[0] if sum(map(reply.count, contained)) == 1 else None, record)


def _letter(letter: str | None, record: Mapping[str, Any]) -> Score:
    answer = text_of(record, "answer").strip().upper()
    return compared(letter == answer, letter) if letter else UNPARSED


def _plain(text: str) -> str:
    return text.lower().translate(_PUNCTUATION)


def _mmstar_letter(reply: str) -> str | None:
    for mark in ",.!?;:'\"":
        reply = reply.strip(mark)
    bare, padded = reply.strip(), f" {reply} "
    for letter in "ABCD":
        if bare.startswith(letter) and not bare[1:2].isalpha():
            return letter
    for letter in "ABCD":
        if bare.endswith(letter) and not bare[-2:-1].isalpha():
            return letter
    lower = padded.lower()
    ends = [place + len(phrase) for phrase in PHRASES if (place := lower.find(phrase)) >= 0]
    places = {letter: max([padded.find(letter, end) for end in ends], default=-1) for letter in "ABCD"}
    forms = ("({})", "{}.", "{}:", "{})", "{} ", "{}")
    for form in (None, *forms):
        if form is not None:
            places = {letter: padded.rfind(form.format(letter)) for letter in "ABCD"}
        letter = max(places, key=places.__getitem__)
        if places[letter] >= 0:
            return letter
    return None
