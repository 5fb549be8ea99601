"""OCRBench: an answer is contained in the reply."""

from collections.abc import Mapping
from typing import Any

from phivision_jax.evaluation.scoring.record import text_of, texts_of
from phivision_jax.evaluation.scoring.score import Score
from phivision_jax.evaluation.scoring.thoughts import answer_of

FORMULAS = "Handwritten Mathematical Expression Recognition"
"""The type of question, all of data set HME100k, in which case counts and spaces do not."""


def ocrbench(prediction: str, record: Mapping[str, Any]) -> Score:
    """Search the reply for one of the answers, as OCRBench and VLMEvalKit.

    Line breaks are spaces. Formulas are compared without spaces, everything else without regard to case.

    Args:
      prediction: The reply.
      record: ``answers``: a text or a list of texts; ``dataset`` and ``question_type``: either marks formulas, as
        "HME100k" or "Handwritten Mathematical Expression Recognition".

    Raises:
      KeyError, ValueError: for a key that is missing or has another value, naming it.
    """
    formulas = text_of(record, "dataset") == "HME100k" or text_of(record, "question_type") == FORMULAS
    reply = _normalized(answer_of(prediction), formulas)
    for answer in texts_of(record, "answers"):
        if _normalized(answer, formulas) in reply:
            return Score(1.0, answer, "answer contained")
    return Score(0.0, reply, "no answer contained")


def _normalized(text: str, formulas: bool) -> str:
    if formulas:
        return text.strip().replace("\n", "").replace(" ", "")
    return text.lower().strip().replace("\n", " ")
