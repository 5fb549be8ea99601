"""Score answers against references."""

from __future__ import annotations

import string

END_THINK = "</think>"


def final_answer(text: str) -> str:
    """The text after the last ``</think>``; all of it without one."""
    return text.rsplit(END_THINK, 1)[-1].strip()


def exact_match(prediction: str, reference: str) -> bool:
    """True for final answers that are equal up to case, surrounding white space and punctuation."""

    def plain(text: str) -> str:
        return final_answer(text).casefold().strip(string.whitespace + string.punctuation)

    return plain(prediction) == plain(reference)
