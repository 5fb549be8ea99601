"""The steps of a run in its directory ``checkpoints/``: listing them, and setting damaged ones aside.

    checkpoints/1000/             a step
    checkpoints/damaged-001000/   a step that was found damaged
    checkpoints/saved.json        {"step": 1000}: the newest step that was saved completely

saved.json makes the loss of all steps an error rather than a new run. In a bucket, where Orbax writes a step under its
final name and commit_success.txt last, it also distinguishes a step that has lost this file from one that was never
finished, which is ignored and which Orbax removes at the next save. The file is written after the step; without it the
checks are only less strict.

Every function raises ``StorageError`` when the bucket does not answer; this is never taken for damage.
"""

from __future__ import annotations

import contextlib
import json
from typing import Any

from phivision_jax.checkpoint import layout
from phivision_jax.checkpoint.layout import ORBAX_MARK, DamagedError, is_committed
from phivision_jax.io import atomic, storage
from phivision_jax.io.storage import Location, wrap_storage_errors

SAVED, DAMAGED = "saved.json", "damaged-"


def list_steps(directory: Location) -> list[int]:
    """The steps that were saved completely; one that lacks a file is listed, because it is damaged, not absent."""
    children = [child for child in storage.children(directory) if child.name.isdecimal()]
    if not storage.is_remote(directory):
        return [int(child.name) for child in children if child.is_dir()]
    saved = newest_saved(directory) or -1
    with wrap_storage_errors(directory):
        return [int(child.name) for child in children if int(child.name) <= saved or is_committed(child)]


def newest_saved(directory: Location) -> int | None:
    """The newest step that was saved, according to saved.json; None when there is no such record."""
    with wrap_storage_errors(directory), contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        return int(json.loads((directory / SAVED).read_bytes())["step"])
    return None


def record_saved(directory: Location, step: int) -> None:
    with wrap_storage_errors(directory):
        atomic.write(directory / SAVED, json.dumps({"step": step}))


def read_intact_meta(checkpoint: Location, *, check_assets: bool = True) -> dict[str, Any]:
    """The metadata of a step, verified together with its other files; its arrays are verified as they are restored.

    Raises:
      DamagedError: naming the file.
    """
    with wrap_storage_errors(checkpoint):
        if not is_committed(checkpoint):
            raise DamagedError(checkpoint, f"its file {ORBAX_MARK} is missing")
    meta = layout.read_meta(checkpoint)
    if check_assets:
        layout.check_assets(checkpoint, meta)
    return meta


def set_aside(directory: Location, step: int) -> str:
    """Rename a damaged step so that neither Orbax nor ``layout.find`` sees it; returns the new name."""
    name = f"{DAMAGED}{step:06d}"
    with wrap_storage_errors(directory):
        while (directory / name).exists():
            name += "+"
        (directory / str(step)).rename(directory / name)
        if not is_committed(directory / name):  # Orbax would remove it
            (directory / name / ORBAX_MARK).write_text("this file was missing when the checkpoint was found damaged\n")
    return name
