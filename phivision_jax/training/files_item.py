"""A directory of plain files as an item of an Orbax checkpoint: the tokenizer and what belongs to it."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp


class FilesHandler(ocp.CheckpointHandler):
    """Copies a directory's files into a checkpoint, so that a step can be loaded and exported without its run."""

    def save(self, directory: Any, args: FilesSave) -> None:
        if jax.process_index() == 0:
            shutil.copytree(args.source, Path(directory), dirs_exist_ok=True)

    def restore(self, directory: Any, args: FilesRestore | None = None) -> Path:
        return Path(directory)


@ocp.args.register_with_handler(FilesHandler, for_save=True)
@dataclasses.dataclass
class FilesSave(ocp.args.CheckpointArgs):
    source: Path


@ocp.args.register_with_handler(FilesHandler, for_restore=True)
@dataclasses.dataclass
class FilesRestore(ocp.args.CheckpointArgs):
    pass
