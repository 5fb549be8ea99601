"""We-Math: the letter of a reply, and the four dimensions of chains of questions."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from phivision_jax.evaluation.scoring.record import text_of
from phivision_jax.evaluation.scoring.score import UNPARSED, Score, compared
from phivision_jax.evaluation.scoring.thoughts import answer_of


def wemath_letter(prediction: str, record: Mapping[str, Any]) -> Score:
    """Find the letter after the last "Answer", as We-Math's own script.

    The characters "<", ">", ":" and "." are removed; then the first character must be one of A to H.

    Args:
      prediction: The reply.
      record: ``answer``: a letter.

    Raises:
      KeyError, ValueError: for a record without a usable ``answer``.
    """
    tail = answer_of(prediction).rpartition("Answer")[2]
    letter = re.sub("[<>:.]", "", tail).strip()[:1]
    answer = text_of(record, "answer")
    return compared(letter == answer, letter) if letter and letter in "ABCDEFGH" else UNPARSED


def wemath_four_dim(
    two_step: Iterable[Sequence[int]], three_step: Iterable[Sequence[int]]
) -> dict[str, dict[str, float]]:
    """The four dimensions of We-Math's own script, over chains of questions.

    A chain has insufficient knowledge (IK) if a step and the complete question are wrong, inadequate generalisation
    (IG) if all steps are right and the question is wrong. If the question is right, the chain is complete mastery (CM)
    or rote memorisation (RM): RM is "strict" if any step is wrong, "loose" if all are.

    Args:
      two_step: Rows of three values, 0 or 1: the two steps, and the complete question.
      three_step: Rows of four values: the three steps, and the complete question.

    Returns:
      "strict" and "loose" → "score", "IK", "IG", "CM", "RM", each from 0 to 1. All are shares of the chains, except RM,
      which is a share of the chains of CM and RM. The score is 1 − IG / 2 − IK − the share of RM among the chains.

    Raises:
      ValueError: for no rows, a row of another length, or a value that is not 0 or 1.
    """
    chains = [_chain("two_step", row, 3) for row in two_step] + [_chain("three_step", row, 4) for row in three_step]
    if not chains:
        raise ValueError("two_step, three_step: expected rows, found none")
    count = len(chains)
    ik = sum(not whole_right and not all(steps) for steps, whole_right in chains)
    ig = sum(not whole_right and all(steps) for steps, whole_right in chains)
    mastered = count - ik - ig
    figures = {}
    for name, known in (("strict", all), ("loose", any)):
        rote = sum(whole_right and not known(steps) for steps, whole_right in chains)
        figures[name] = {
            "score": (count - ig / 2 - rote - ik) / count,
            "IK": ik / count,
            "IG": ig / count,
            "CM": (mastered - rote) / count,
            "RM": rote / max(mastered, 1),
        }
    return figures


def _chain(name: str, row: Sequence[int], length: int) -> tuple[list[bool], bool]:
    if len(row) != length or any(each not in (0, 1) for each in row):
        raise ValueError(f"{name}: expected rows of {length} values, 0 or 1, found {row!r:.100}")
    *steps, whole_right = map(bool, row)
    return steps, whole_right
