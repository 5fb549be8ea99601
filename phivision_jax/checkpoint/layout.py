"""Our checkpoint directory, the same for a conversion and for a step of a training run.

    DIR/params/          every parameter, vision_tail included (Orbax: zarr in OCDBT)
    DIR/opt_state/       optimizer state; training only
    DIR/meta/metadata    JSON: {"format": 1, "model": …, "step": …, "plan": …, "run": …, "code": …,
                         "checksums": {array: hex}}
    DIR/assets/          tokenizer, chat template and whatever else a Hugging Face directory holds beside its weights

    DIR/MANIFEST         CRC-32 and size of every file; a run's steps only

A training run keeps its steps under RUN/checkpoints/<step>/. Orbax writes a step under another name and renames it
when it is whole, so what bears a step's name is complete; in a bucket (``gs://…``), where a directory cannot be
renamed at once, it is complete when it holds commit_success.txt, which is written last. Beside them, sealed.json lists
the steps that have had a MANIFEST, and damaged-<step>/ is a step that was found damaged (``checkpoint/manager.py``).

This file knows where things are and imports neither JAX nor Orbax: the converter needs it and must stay small.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import phivision_jax
from phivision_jax.config import ModelConfig
from phivision_jax.io import storage
from phivision_jax.io.storage import Location, read_json

FORMAT = 1
CHECKPOINTS = "checkpoints"
ORBAX_MARK = "commit_success.txt"
"""Orbax's own note, which it leaves in every folder of a step, and at its top when all of it is written."""
PARAMS, OPT_STATE, META, ASSETS = "params", "opt_state", "meta", "assets"
CHECKSUMS = "checksums"
"""In the metadata: of every array of params/ and opt_state/ (``checkpoint/checksums.py``)."""
SEALED, DAMAGED = "sealed.json", "damaged-"


def is_checkpoint(path: Location) -> bool:
    return (path / PARAMS).exists() and (path / META / "metadata").exists()


def is_committed(step: Location) -> bool:
    """Whether Orbax has written all of a step; if not, it is about it, or was when it was killed."""
    return not storage.is_remote(step) or (step / ORBAX_MARK).exists()


def find(path: str | Location) -> Location:
    """The checkpoint at ``path``: itself, or the newest step of the training run there.

    Raises:
      ValueError: when there is none.
      StorageError: when it is in a bucket that cannot be read.
    """
    path = storage.location(path)
    storage.check(path)
    with storage.wrap_storage_errors(path):
        return _find(path)


def _find(path: Location) -> Location:
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    if is_checkpoint(path):
        return path
    for folder in (path, path / CHECKPOINTS):
        children = [child for child in storage.children(folder) if child.name.isdecimal()]
        steps = [child for child in children if is_checkpoint(child) and is_committed(child)]
        if steps:
            return max(steps, key=lambda child: int(child.name))
    raise ValueError(f"{path} is not a checkpoint of ours (no params/ and meta/metadata) and holds no training steps")


def read_meta(checkpoint: Location) -> tuple[ModelConfig, dict[str, Any]]:
    """The model's configuration, and everything else that ``meta/metadata`` says.

    Raises:
      ValueError: when the file is not one of ours, or of a later format.
    """
    path = checkpoint / META / "metadata"
    meta = read_json(path)
    if meta.get("format") != FORMAT or not isinstance(meta.get("model"), dict):
        raise ValueError(f"{path}: format {meta.get('format')!r}; this version reads format {FORMAT}")
    return ModelConfig.from_dict(meta.pop("model")), meta


def assets_of(checkpoint: Location) -> Location:
    return checkpoint / ASSETS


def code_version() -> str:
    """What this code is: its version and, in a clone, git's name of the commit ("0.1.0 a1b2c3d4e5f6-dirty")."""
    root, version = Path(__file__).parents[2], phivision_jax.__version__
    if not (root / ".git").exists():
        return version
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.SubprocessError):  # no git here, or one that does not answer
        said = ""
    return f"{version} {said}".strip()
