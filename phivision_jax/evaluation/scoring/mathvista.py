"""MathVista: normalisation of an extracted answer, and the choice that VLMEvalKit infers without a judge."""

import re
from collections.abc import Mapping
from typing import Any

from phivision_jax.evaluation.scoring.choices import infer_option
from phivision_jax.evaluation.scoring.edit_distance import EditDistance
from phivision_jax.evaluation.scoring.record import options_of, text_of
from phivision_jax.evaluation.scoring.score import UNPARSED, Score, compared
from phivision_jax.evaluation.scoring.thoughts import answer_of

LONGEST_CHOICE = 50_000
"""Characters of an answer, from its start, whose distance to the choices is measured; a longer one is like none."""


def mathvista_normalize(prediction: str, record: Mapping[str, Any]) -> Score:
    """Normalise an answer and compare it, as ``normalize_extracted_answer`` and ``safe_equal`` of MathVista.

    Of a question with choices: the first letter in parentheses, or a letter alone, selects the choice; any other text
    selects the nearest choice by Levenshtein distance. An integer is truncated, a float is rounded to ``precision``
    digits, and both are compared as text. Lists, and texts without choices, are compared as they are.

    Args:
      prediction: The reply, or the answer that a judge extracted from it.
      record: ``question_type``: "multi_choice" or "free_form"; ``answer_type``: "text", "integer", "float" or "list";
        ``choices``: a list of texts, read for questions with choices; ``precision``: digits of a float, of any type
        that ``int`` takes; ``answer``.

    Raises:
      KeyError, ValueError: for a key that is missing or has another value, naming it.
    """
    extraction = answer_of(prediction)
    answer = text_of(record, "answer")
    if _has_choices(record):
        normalized = _nearest(extraction, list(options_of(record, "choices").values()))
        return compared(normalized == answer, normalized)
    kind = text_of(record, "answer_type")
    if kind not in ("text", "integer", "float", "list"):
        raise ValueError(f'answer_type: expected "text", "integer", "float" or "list", found {kind!r}')
    if kind in ("text", "list"):
        return compared(extraction == answer, extraction)
    digits = _precision(record) if kind == "float" else 0
    try:
        number = float(extraction)
        normalized = str(int(number) if kind == "integer" else round(number, digits))
    except (ValueError, OverflowError):
        return UNPARSED
    return compared(normalized == answer, normalized)


def mathvista_prefetch(prediction: str, record: Mapping[str, Any]) -> Score:
    """Infer an answer as VLMEvalKit's ``post_check`` does before it asks a judge.

    Of a question with choices: the letter that ``can_infer`` finds, compared with ``answer_option``. Otherwise the
    complete reply as a number, compared with ``answer``: an integer if ``answer`` is one. Everything else is left to a
    judge and scores 0 here.

    Args:
      prediction: The reply.
      record: ``question_type``: "multi_choice" or "free_form"; ``choices``: a list of texts, and ``answer_option``: a
        letter, for questions with choices; ``answer``; optionally ``answer_type``, as in ``mathvista_normalize``,
        which overrides the type of ``answer``.

    Raises:
      KeyError, ValueError: for a key that is missing or has another value, naming it.
    """
    reply = answer_of(prediction)
    if _has_choices(record):
        letter = infer_option(reply, options_of(record, "choices"))
        return compared(letter == text_of(record, "answer_option"), letter) if letter else UNPARSED
    answer = text_of(record, "answer")
    types: dict[str, list[type[int] | type[float]]] = {"integer": [int], "float": [float]}
    kinds = types.get(text_of(record, "answer_type"), []) if "answer_type" in record else [int, float]
    for kind in kinds:
        try:
            expected = kind(answer)
        except ValueError:
            continue
        try:
            number = kind(reply)
        except ValueError:
            return UNPARSED
        return compared(number == expected, reply)
    return UNPARSED


def _has_choices(record: Mapping[str, Any]) -> bool:
    kind = text_of(record, "question_type")
    if kind not in ("multi_choice", "free_form"):
        raise ValueError(f'question_type: expected "multi_choice" or "free_form", found {kind!r}')
    return kind == "multi_choice"


def _nearest(extraction: str, choices: list[str]) -> str:
    in_parentheses = re.search(r"\(([a-zA-Z])\)", extraction)
    letter = in_parentheses[1].upper() if in_parentheses else extraction
    index = ord(letter) - ord("A") if len(letter) == 1 else -1
    if 0 <= index < len(choices):
        return choices[index]
    return min(choices, key=EditDistance(letter[:LONGEST_CHOICE]).to)


def _precision(record: Mapping[str, Any]) -> int:
    """Digits of a float: the data set has them as floats, for which ``round`` raises TypeError."""
    try:
        return int(record["precision"])
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"precision: expected a number, found {record['precision']!r:.100}") from None
