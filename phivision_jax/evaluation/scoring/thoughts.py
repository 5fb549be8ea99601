"""Removal of thoughts from a reply."""

import io

TAGS = (("<think>", "</think>"), ("<analysis>", "</analysis>"))
"""Pairs of tags around a thought, in the order in which they are removed."""
LONGEST_ANSWER = 100_000
"""Characters of an answer that rules read, from its end, so that every rule is fast on any text. Replies that fit into
the context of the model are shorter."""


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
    return think_strip(prediction)[-LONGEST_ANSWER:]


def _without_blocks(text: str, opening: str, closing: str) -> str:
    """Remove blocks from the first opening tag to the next closing tag until none is left, in linear time."""
    kept = io.StringIO()
    position = 0
    while True:
        # A removal can join the halves of an opening tag, so the end of what is kept is searched as well.
        end = kept.tell()
        overlap = min(end, len(opening) - 1)
        kept.seek(end - overlap)
        joined = kept.read(overlap) + text[position : position + len(opening) - 1]
        found = joined.find(opening)
        if found >= 0:
            start, inside = end - overlap + found, position + found + len(opening) - overlap
        else:
            first = text.find(opening, position)
            start, inside = end + first - position, first + len(opening)
        close = text.find(closing, inside) if found >= 0 or first >= 0 else -1
        if close < 0:
            kept.write(text[position:])
            return kept.getvalue()
        if found < 0:
            kept.write(text[position:first])
        kept.seek(start)
        kept.truncate()
        position = close + len(closing)
