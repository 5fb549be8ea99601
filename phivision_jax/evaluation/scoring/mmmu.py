"""MMMU's own rules for multiple choice and open questions."""

import re
from collections.abc import Mapping
from typing import Any

from phivision_jax.evaluation.scoring.record import options_of, texts_of
from phivision_jax.evaluation.scoring.score import UNPARSED, Score, compared
from phivision_jax.evaluation.scoring.thoughts import answer_of

LONGEST_OPEN = 30_000
"""Characters of an answer, from its end, that ``mmmu_open`` searches: each line of it is searched for phrases."""
KEY_PHRASES = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
"""Phrases before an answer; the last line may also have "=" before it."""

# As the patterns of MMMU, which take quadratic time on long numbers: a number is read from its first digit, at once.
_THOUSANDS = re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b")
_SCIENTIFIC = re.compile(r"-?(?<!\d)\d++(?:\.\d++)?+[eE][+-]?\d+")
_SIMPLE = re.compile(r"-?(?:(?<!\d)\d++\.\d++|\.\d++|(?<!\d)\d++\b)(?![eE][+-]?\d)(?![,\d])")


def mmmu_mc(prediction: str, record: Mapping[str, Any]) -> Score:
    """Find the option of a reply, as ``parse_multi_choice_response`` of MMMU, without its random guess.

    Candidates are letters in parentheses; without any, letters between spaces; without any, in a reply of more than
    five words, options whose text is contained. Of several, the one that appears last counts.

    Args:
      prediction: The reply.
      record: ``options``: a list of texts; ``answer``: a letter, or a list of letters that are all right.

    Raises:
      KeyError, ValueError: for a key that is missing or has another value, naming it.
    """
    reply = answer_of(prediction)
    for mark in ",.!?;:'":
        reply = reply.strip(mark)
    reply = f" {reply} "
    options = options_of(record, "options")
    answers = texts_of(record, "answer")
    places = {letter: reply.rfind(f"({letter})") for letter in options}
    if max(places.values()) < 0:
        places = {letter: reply.rfind(f" {letter} ") for letter in options}
    if max(places.values()) < 0 and len(reply.split(None, 5)) > 5:
        lower = reply.lower()
        places = {letter: lower.rfind(text.lower()) for letter, text in options.items()}
    letter = max(places, key=places.__getitem__)
    return compared(letter in answers, letter) if places[letter] >= 0 else UNPARSED


def mmmu_open(prediction: str, record: Mapping[str, Any]) -> Score:
    """Compare the parts of a reply with the answer of an open question, as ``eval_open`` of MMMU.

    The parts are, of each line with a phrase such as "is" or "therefore", the shortest text after one; without any,
    the reply; and all numbers in these. A part is right if it contains the answer, up to case, or is the same number
    up to two decimals.

    Args:
      prediction: The reply.
      record: ``answer``: a text, or a list of texts that are all right.

    Returns:
      A score that has extracted the parts, as a list of texts; unparsed for an empty reply.

    Raises:
      KeyError, ValueError: for a record without a usable ``answer``.
    """
    references = [each for text in texts_of(record, "answer") for each in _normalized(text)]
    parts = _key_parts(answer_of(prediction)[-LONGEST_OPEN:])
    parts += [number for part in parts for pattern in _NUMBERS for number in pattern.findall(part)]
    found = [each for part in parts for each in _normalized(part)]
    numbers = {each for each in references if isinstance(each, float)}
    texts = [each for each in references if isinstance(each, str)]
    right = any(each in numbers if isinstance(each, float) else any(text in each for text in texts) for each in found)
    if not any(parts) and not right:
        return UNPARSED
    return compared(right, parts, "containing the answer")


_NUMBERS = (_THOUSANDS, _SCIENTIFIC, _SIMPLE)


def _normalized(text: str) -> list[str | float]:
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        pass
    text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]  # a letter in a word is no answer


def _key_parts(reply: str) -> list[str]:
    reply = reply.strip().strip(".").lower()
    lines = reply.split("\n")
    parts = []
    for index, line in enumerate(lines):
        phrases = (*KEY_PHRASES, "=") if index == len(lines) - 1 else KEY_PHRASES
        shortest = ""
        for phrase in phrases:
            if phrase in line:
                tail = line.rpartition(phrase)[2].strip()
                if not shortest or len(tail) < len(shortest):
                    shortest = tail
        if shortest and shortest not in (":", ",", ".", "!", "?", ";", "'"):
            parts.append(shortest)
    return parts or [reply]
