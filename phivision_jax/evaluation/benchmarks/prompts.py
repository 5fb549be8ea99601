"""Prompts that several benchmarks share, and options that a question has in its text."""

import re
from collections.abc import Mapping

from phivision_jax.text.constants import IMAGE_MARKER

LETTER_ONLY = "Answer with the option's letter from the given choices directly."
"""lmms-eval's instruction."""
RELATIVE_BOX = (
    "Output its bbox coordinates using the format of [x1, y1, x2, y2] using relative coordinates from 0.0000 to 1.0000."
)
"""The instruction of the released notebook, to which the model answers as it was trained."""
_OPTION = re.compile(r"(?<![^\s,;])\(?([A-H])(?:\)|[.:])\s*")


def plain(text: str) -> str:
    """A text in which an image marker is text."""
    return text.replace(IMAGE_MARKER, f"<\\{IMAGE_MARKER[1:]}")


def multiple_choice(question: str, options: Mapping[str, str], *, hint: str = "", closing: bool = True) -> str:
    """The prompt of VLMEvalKit for multiple choice; its last line, with a space at the end, is optional."""
    lines = [f"Hint: {hint}"] * bool(hint) + [f"Question: {question}"]
    if options:
        lines += ["Options:", *(f"{letter}. {option}" for letter, option in options.items())]
        lines += ["Please select the correct answer from the options above. "] * closing
    return "\n".join(lines) + "\n"


def split_options(text: str) -> dict[str, str]:
    """Options in a text: "(A) red\\n(B) blue", "A: red, B: blue" or "A. red; B. blue"; empty where there are none.

    Letters count in their order, each once, so that "A" or "B." inside of an option is text.
    """
    wanted, found = "A", list[re.Match[str]]()
    for match in _OPTION.finditer(text):
        if match[1] == wanted:
            found.append(match)
            wanted = chr(ord(wanted) + 1)
    if len(found) < 2:
        return {}
    ends = [match.start() for match in found[1:]] + [len(text)]
    return {m[1]: text[m.end() : end].strip(" \t\r\n,;") for m, end in zip(found, ends, strict=True)}
