"""The option that a reply names, by the rule of VLMEvalKit without a judge."""

import re
from collections.abc import Mapping
from typing import Any

from phivision_jax.evaluation.scoring.record import options_of, text_of
from phivision_jax.evaluation.scoring.score import UNPARSED, Score, compared
from phivision_jax.evaluation.scoring.thoughts import answer_of

REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
"""Phrases of models that refuse: they answer Z, which is no option."""
FAILED = "Failed to obtain answer via API"
"""The reply that VLMEvalKit records for a request that failed; letters in it are no options."""
_SEPARATORS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_ANSWER_IS = re.compile(r"answer\s+is\s+\**([ABCD])", re.IGNORECASE)
_LAST_WORDS = 4
"""Words at the end among which a lone letter counts as the answer."""


def mcq(prediction: str, record: Mapping[str, Any]) -> Score:
    """Infer the option of a reply, as ``can_infer`` of VLMEvalKit with the judge "exact_matching".

    The only option letter that is a word, if it first appears among the last four words; else the letter of "answer is
    X"; else the only option whose text is contained in a reply of at most twice the length of all options. Z is a
    refusal.

    Args:
      prediction: The reply.
      record: ``options``: letter → text; ``answer``: a letter.

    Raises:
      KeyError, ValueError: for a key that is missing or has another value, naming it.
    """
    letter = infer_option(answer_of(prediction), options_of(record, "options"))
    return compared(letter == text_of(record, "answer"), letter) if letter else UNPARSED


def infer_option(reply: str, options: Mapping[str, str]) -> str | None:
    """The letter of an option, Z for a refusal, None for neither."""
    return _by_letter(reply, options) or _by_text(reply, options)


def has_word(text: str, word: str) -> bool:
    """True if ``word`` is in a text with white space, or nothing, on both sides."""
    word = re.escape(word)
    return re.search(rf"{word}(?!\S)(?<!\S{word})", text) is not None


def _by_letter(reply: str, options: Mapping[str, str]) -> str | None:
    if FAILED in reply:
        return None
    if any(phrase in reply for phrase in REFUSALS):
        return "Z"
    words = reply.translate(_SEPARATORS)
    named = [letter for letter in options if has_word(words, letter)]
    if len(named) == 1:
        pieces = words.rsplit(None, _LAST_WORDS)
        if len(pieces) <= _LAST_WORDS or not has_word(pieces[0], named[0]):
            return named[0]
    elif not named and has_word(words, "Z"):
        return "Z"
    phrase = _ANSWER_IS.search(reply)
    return phrase[1].upper() if phrase and phrase[1].upper() in options else None


def _by_text(reply: str, options: Mapping[str, str]) -> str | None:
    reply = reply.lower()
    if len(reply) > 2 * sum(map(len, options.values())):
        return None
    named = [letter for letter, text in options.items() if text.lower() in reply]
    return named[0] if len(named) == 1 else None
