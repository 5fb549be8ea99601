"""The options of reading items, also flags of ``phivision data import``: this module imports nothing slow."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from phivision_jax.data.records import check_task

Format = Literal["json", "parquet", "tfds", "array-record"]
Unit = Literal["pixels", "thousand", "unit"]
"""Pixels of the upright image; thousandths of its sides; shares of its sides."""


@dataclasses.dataclass(frozen=True)
class ItemOptions:
    """Rules by which items become records."""

    images: Path | None = None
    """Folder to which image paths are relative, and which none may leave; default: the folder of the data file."""
    also_allow: tuple[Path, ...] = ()
    """Further folders in which images may be, as targets of symbolic links."""
    rename: tuple[str, ...] = ()
    """Fields that have other names in the data: theirs=ours, as in question=prompt."""
    task: str = "general"
    """Task of records that state none."""
    default_mode: Literal["nothink", "think", "refuse"] = "nothink"
    """Mode of records that neither state one nor show it in their answers; refuse quarantines them."""
    system: Literal["template", "user", "drop"] = "template"
    """System messages: left to the checkpoint's template, put before the first user message, or dropped."""
    boxes: Unit = "pixels"
    """Unit of the numbers in the field objects."""
    inline_boxes: Unit | None = None
    """Rewrite [x, y] and [x1, y1, x2, y2] in the texts of records with one image, from this unit to [0, 1]."""
    allow_urls: bool = False
    """Fetch images from http and https."""
    any_extension: bool = False
    """Accept image files whose names belong to another format."""

    @property
    def renames(self) -> dict[str, str]:
        """Their names → ours."""
        return {theirs: ours for theirs, _, ours in (pair.partition("=") for pair in self.rename)}

    def check(self) -> None:
        """Check the values.

        Raises:
          ValueError: for a name that is not "theirs=ours", or an unknown task.
          NotADirectoryError: for a folder that does not exist.
        """
        check_task(self.task)
        for pair in self.rename:
            theirs, _, ours = pair.partition("=")
            if not (theirs and ours):
                raise ValueError(f"--rename {pair}: write it as theirs=ours, the data's name first")
        folders = [("--images", self.images), *(("--also-allow", folder) for folder in self.also_allow)]
        for flag, folder in folders:
            if folder is not None and not folder.is_dir():
                raise NotADirectoryError(f"{flag} {folder}: there is no such folder")

    def key(self) -> dict[str, Any]:
        """The options as JSON."""
        return dataclasses.asdict(self) | {
            "images": self.images and str(self.images.resolve()),
            "also_allow": [str(folder.resolve()) for folder in self.also_allow],
            "rename": list(self.rename),
        }
