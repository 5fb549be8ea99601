"""An Orbax item that is a directory of plain files: the tokenizer and what belongs to it."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from phivision_jax.io import storage


class FilesHandler(ocp.CheckpointHandler):
    """Copies a directory into a checkpoint, so that a step can be loaded and exported without its run."""

    def save(self, directory: Any, args: FilesSave) -> None:
        if jax.process_index() != 0:
            return
        target = storage.location(os.fspath(directory))
        if isinstance(target, Path):
            shutil.copytree(args.source, target, dirs_exist_ok=True)
        else:
            storage.upload(args.source, target)

    def restore(self, directory: Any, args: Any = None) -> None:
        raise NotImplementedError("files are read where they are")


@ocp.args.register_with_handler(FilesHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class FilesSave(ocp.args.CheckpointArgs):
    """Argument of a save: the directory to copy."""

    source: Path
