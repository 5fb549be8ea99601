"""The tables of a report as Markdown."""

import re
from collections.abc import Sequence

from phivision_jax.io.html import Section
from phivision_jax.io.messages import printable


def markdown(title: str, sections: Sequence[Section]) -> str:
    """A page with the title, and each section's table below its heading and note."""
    parts = [f"# {_text(title)}"]
    for section in sections:
        parts += [f"## {_text(section.title)}"] if section.table or section.note else []
        parts += [_text(section.note)] if section.note else []
        if section.table is not None:
            sides = ["---" if i < section.table.names else "---:" for i in range(len(section.table.header))]
            lines = [list(map(_text, section.table.header)), sides, *(map(_text, row) for row in section.table.rows)]
            parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts) + "\n"


def _text(text: str) -> str:
    """The text on one line, without the characters that Markdown and HTML obey."""
    line = " ".join(printable(text).split())
    return re.sub(r"([\\`*_{}\[\]<>|#~&])", r"\\\1", line)
