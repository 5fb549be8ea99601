"""Tables of the documentation that are generated from committed results: where they go in a page."""

from __future__ import annotations

from collections.abc import Sequence


def markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def fill(page: str, name: str, table: str) -> str:
    """The page with ``table`` between ``<!-- name -->`` and ``<!-- end of name -->``.

    Raises:
      ValueError: for a page without these two lines.
    """
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"the page has no lines {begin.strip()!r} and {end!r} to write the table between")
    return f"{before}{begin}{table}\n{end}{after}"
