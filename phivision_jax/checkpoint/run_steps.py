"""The steps of a run as they lie in ``checkpoints/``, on a disk or in a bucket: which there are, and what is with each.

In a bucket (``gs://…``) Orbax cannot rename a step at once. It writes it under its name, and commit_success.txt last: a
step without it that was never sealed is none, and Orbax clears it away at the next save. A sealed one that lacks it is
damaged.
"""

from __future__ import annotations

from typing import Any

from phivision_jax.checkpoint import manifest
from phivision_jax.checkpoint.layout import DAMAGED, META, ORBAX_MARK, is_committed
from phivision_jax.io import storage
from phivision_jax.io.storage import Location, read_json


class Steps:
    """Every method raises ``StorageError`` when the bucket does not answer: that is never damage."""

    def __init__(self, directory: Location) -> None:
        self.directory = directory

    def __call__(self) -> list[int]:
        """By name alone: what lacks a file is not absent but damaged. What Orbax was still writing is absent."""
        found = [child for child in storage.children(self.directory) if child.name.isdecimal()]
        if not storage.is_remote(self.directory):
            return [int(child.name) for child in found if child.is_dir()]
        sealed = self.sealed()
        with storage.wrap_storage_errors(self.directory):
            return [int(child.name) for child in found if int(child.name) in sealed or is_committed(child)]

    def sealed(self) -> set[int]:
        """Those that have had a manifest."""
        with storage.wrap_storage_errors(self.directory):
            return manifest.sealed(self.directory)

    def has_manifest(self, step: int) -> bool:
        with storage.wrap_storage_errors(self.directory):
            return (self.directory / str(step) / manifest.MANIFEST).exists()

    def meta(self, step: int) -> dict[str, Any]:
        """What ``meta/metadata`` says; raises ``FileNotFoundError`` or ``ValueError`` when it says nothing."""
        with storage.wrap_storage_errors(self.directory):
            return read_json(self.directory / str(step) / META / "metadata")

    def damage(self, step: int, share: int, shares: int) -> str | None:
        """What is wrong with a process's share of the files, as half a sentence; None: nothing."""
        checkpoint = self.directory / str(step)
        with storage.wrap_storage_errors(checkpoint):
            if not is_committed(checkpoint):
                return f"its file {ORBAX_MARK} is missing"
        try:
            return manifest.damage(checkpoint, share, shares)
        except FileNotFoundError:
            if step in self.sealed():
                return f"its file {manifest.MANIFEST} is missing"
        try:  # killed before it was sealed, or older than manifests: its arrays will tell
            self.meta(step)
        except (FileNotFoundError, ValueError) as error:
            return first_line(error)
        return None

    def set_aside(self, step: int) -> str:
        """Rename it, out of the sight of Orbax and of ``checkpoint.find``; returns the name."""
        name = f"{DAMAGED}{step:06d}"
        with storage.wrap_storage_errors(self.directory):
            while (self.directory / name).exists():
                name += "+"
            aside = self.directory / name
            (self.directory / str(step)).rename(aside)
            if not is_committed(aside):  # Orbax would clear it away
                (aside / ORBAX_MARK).write_text("it was missing when this checkpoint was found damaged\n")
        return name


def first_line(error: BaseException) -> str:
    """One line, short enough to be read, of messages that may run over pages: what was tried, and the cause."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(" :.")
    return line if len(line) <= 400 else f"{line[:150]} … {line[-250:]}"
