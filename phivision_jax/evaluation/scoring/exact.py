"""Equality of answers up to what carries no meaning."""

import re

QUOTES = ('""', "''", "``", "“”", "‘’", "«»")
"""Pairs of quotation marks that ``exact_match`` removes around an answer."""

_FULL_STOP = re.compile(r"(?<=[^.])\.\Z")


def exact_match(prediction: str, reference: str) -> bool:
    """True for answers that are equal up to what carries no meaning.

    That is: thoughts (all text up to ``</think>``), case, surrounding white space, one full stop at the end, and a pair
    of quotation marks around all of it, which may have the full stop inside. Everything else counts: a sign, an
    operator, a unit, a bracket, a decimal point, an article, any other punctuation. "-5", "5%", "(5)" and "5!" all
    differ from "5", and "?" from an empty answer.
    """
    return _plain(prediction) == _plain(reference)


def _plain(text: str) -> str:
    text = text.rsplit("</think>", 1)[-1].casefold()
    for _ in range(2):  # outside the quotation marks, then inside
        text = _FULL_STOP.sub("", text.strip()).strip()
        if len(text) > 2 and text[0] + text[-1] in QUOTES and not {text[0], text[-1]} & set(text[1:-1]):
            text = text[1:-1]
    return text.strip()
