"""HallusionBench: yes or no, and accuracy over answers, figures and questions."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from phivision_jax.evaluation.scoring.choices import has_word
from phivision_jax.evaluation.scoring.record import text_of
from phivision_jax.evaluation.scoring.score import UNPARSED, Score, compared
from phivision_jax.evaluation.scoring.thoughts import answer_of

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_FULL_STOPS = 32
"""VLMEvalKit passes a flag of value 32 as the number of full stops to remove."""
_ANSWERS = {"yes": "Yes", "no": "No", "1": "Yes", "0": "No"}


def hallusion_yesno(prediction: str, record: Mapping[str, Any]) -> Score:
    """Find yes or no, as ``YOrN_Extraction`` of VLMEvalKit: one of the two words must be there, and the other not.

    Args:
      prediction: The reply.
      record: ``answer``: "Yes" or "No", or "1" or "0" as in the original data.

    Raises:
      KeyError, ValueError: for a record without a usable ``answer``.
    """
    answer = _ANSWERS.get(text_of(record, "answer").lower())
    if answer is None:
        raise ValueError(f'answer: expected "Yes", "No", "1" or "0", found {record["answer"]!r:.100}')
    words = _without_punctuation(answer_of(prediction).lower())
    named = [each for each in ("Yes", "No") if has_word(words, each.lower())]
    return compared(named[0] == answer, named[0]) if len(named) == 1 else UNPARSED


def hallusion_groups(records: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Accuracy over answers, figures and questions, as ``Hallusion_rating`` of VLMEvalKit, from 0 to 1.

    Args:
      records: Rows of ``l2_category``, ``set_id``, ``figure_id``, ``question_id`` and ``correct`` (0 or 1, or a bool).
        Groups are equal in ``l2_category``, which must contain the category, as VLMEvalKit's "VD_ocr" and "VS_ocr" do;
        ``category`` itself is not read.

    Returns:
      "aAcc": answers that are right; "fAcc": figures of which all answers are right; "qAcc": questions of which all
      answers are right. All are 0 without rows.

    Raises:
      KeyError: for a missing key, naming it.
    """
    figures: dict[tuple[str, ...], bool] = defaultdict(lambda: True)
    questions: dict[tuple[str, ...], bool] = defaultdict(lambda: True)
    answers = []
    for row in records:
        correct = bool(row["correct"])
        answers.append(correct)
        for groups, key in ((figures, "figure_id"), (questions, "question_id")):
            groups[tuple(str(row[each]) for each in ("l2_category", "set_id", key))] &= correct
    rates = {"aAcc": answers, "fAcc": list(figures.values()), "qAcc": list(questions.values())}
    return {name: sum(each) / max(len(each), 1) for name, each in rates.items()}


def _without_punctuation(text: str) -> str:
    """Remove marks beside a space, and all marks of a text with a number such as "1,000"; the others become spaces."""
    remove_all = re.search(r"\d,\d", text) is not None
    result = text
    for mark in _MARKS:
        remove = remove_all or f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if remove else " ")
    return re.sub(r"(?<!\d)\.(?!\d)", "", result, count=_FULL_STOPS)
