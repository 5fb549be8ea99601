"""Scores of answers against references."""

from __future__ import annotations

import string

END_THINK = "</think>"


def final_answer(text: str) -> str:
    """What follows the thoughts, if there are any."""
    return text.rsplit(END_THINK, 1)[-1].strip()


def exact_match(prediction: str, reference: str) -> bool:
    """Equal up to case, surrounding white space and punctuation, thoughts left out."""

    def plain(text: str) -> str:
        return final_answer(text).casefold().strip(string.whitespace + string.punctuation)

    return plain(prediction) == plain(reference)
