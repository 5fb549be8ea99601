"""The identity of the weights in a directory: replies that were cached for others must not be used."""

import hashlib
import json
from pathlib import Path

from phivision_jax.checkpoint import layout
from phivision_jax.convert.hf_config import is_hf
from phivision_jax.io import storage
from phivision_jax.io.storage import Location

_SMALL = 1 << 20
"""Bytes: smaller files count by their content, larger ones by their size and time."""


def fingerprint(path: Location) -> str:
    """SHA-256 that differs between checkpoints with different weights, tokenizers or settings.

    The metadata of this project's checkpoints have checksums of everything. Of a Hugging Face directory, reading all
    weights would take minutes: files of weights count by name, size and time of change.

    Args:
      path: as ``loading.locate`` gives it.

    Raises:
      StorageError: when a bucket does not answer.
    """
    with storage.wrap_storage_errors(path):
        if not is_hf(path):
            return hashlib.sha256((path / layout.METADATA).read_bytes()).hexdigest()
        found: list[list[str | int]] = []
        for name, size in storage.files(path).items():
            if size < _SMALL:
                found.append([name, hashlib.sha256((path / name).read_bytes()).hexdigest()])
            elif isinstance(path, Path):
                found.append([name, size, (path / name).stat().st_mtime_ns])
            else:
                found.append([str(path / name), size])
        return hashlib.sha256(json.dumps(found).encode()).hexdigest()
