"""Description of the package for an index page: the README, whose links to files of the repository become their names.

Relative links lead nowhere on an index page, and the repository has no address yet.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


def index_page(readme: str) -> str:
    """Keep links with an address; turn the others into text with the file's name, and drop images and comments."""
    readme = re.sub(r"!\[[^\]]*\]\((?!https?:)[^)]*\)\n*|<!--.*?-->\n?", "", readme)
    return re.sub(r"\[([^\]]*)\]\((?!https?:)([^)#]*)[^)]*\)", _named, readme)


def _named(link: re.Match[str]) -> str:
    text, file = link.groups()
    return text if file in ("", text) else f"{text} ({file})"


class ReadmeHook(MetadataHookInterface):
    """Hatchling's hook for ``dynamic = ["readme"]``."""

    def update(self, metadata: dict[str, Any]) -> None:
        text = index_page(Path(self.root, "README.md").read_text(encoding="utf-8"))
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
