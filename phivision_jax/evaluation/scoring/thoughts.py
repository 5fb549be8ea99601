"""Removal of thoughts from a reply."""

import io

TAGS = (("<think>", "</think>"), ("<analysis>", "</analysis>"))
"""Pairs of tags around a thought, in the order in which they are removed."""
LONGEST_REPLY, LONGEST_ANSWER = 400_000, 100_000
"""Characters of a reply and of its answer that rules read, from the end, so that every rule is fast on any text. Those
that fit into the context of the model are shorter."""


def think_strip(text: str) -> str:
    """Remove the thoughts of a reply, as lmms-eval does by default before it scores.

    That is: ``<think>`` and ``<analysis>`` with all text up to the closing tag; if only the closing tag is left, all
    text before the last one. A thought that is not closed stays. White space around the rest is removed.
    """
    for opening, closing in TAGS:
        if closing not in text:
            continue
        text = _without_blocks(text, opening, closing)
        if closing in text and opening not in text:
            text = text.rpartition(closing)[2]
    return text.strip()


def answer_of(prediction: str) -> str:
    """The answer of a reply: without thoughts, and no longer than rules can read in bounded time."""
    return think_strip(prediction[-LONGEST_REPLY:])[-LONGEST_ANSWER:]


def _without_blocks(text: str, opening: str, closing: str) -> str:
    """Remove blocks from the first opening tag to the next closing tag until none is left, in linear time."""
    kept = io.StringIO()
    reach = len(opening) - 1
    tail = ""  # the end of what is kept: a removal can join the halves of an opening tag
    position = 0
    while True:
        joined = (tail + text[position : position + reach]).find(opening) if "<" in tail else -1
        if joined >= 0:
            first, inside = position, position + joined + len(opening) - len(tail)
        else:
            first = text.find(opening, position)
            inside = first + len(opening)
        close = text.find(closing, inside) if first >= 0 else -1
        if close < 0:
            kept.write(text[position:])
            return kept.getvalue()
        kept.write(text[position:first])
        tail = (tail + text[position:first])[-reach:]
        if joined >= 0:
            kept.seek(kept.tell() - len(tail) + joined)
            kept.truncate()
            overlap = min(kept.tell(), reach)
            kept.seek(kept.tell() - overlap)
            tail = kept.read()
        position = close + len(closing)
