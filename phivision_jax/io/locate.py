"""Files that a manifest of unknown origin names: they must be in its directory."""

from __future__ import annotations

import os
from pathlib import Path

from phivision_jax.io.messages import shorten


def locate(directory: Path, name: str) -> Path:
    """The path of a file in a directory.

    Raises:
      ValueError: for a name or a link that leads elsewhere.
    """
    path = directory / name
    sound = name.isprintable() and len(name) < 256
    if not sound or os.path.realpath(path) != f"{os.path.realpath(directory)}/{name}":
        problem = "is no file of this directory, or is a link: copy the directory with its files (cp -rL)"
        raise ValueError(f"{directory}: {shorten(name)} {problem}")
    return path
