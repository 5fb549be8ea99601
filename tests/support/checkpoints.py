"""Checkpoints written for tests: parameters without a training run, edited metadata."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from phivision_jax.checkpoint import arrays, layout
from phivision_jax.config import ModelConfig


def save_checkpoint(
    directory: Path,
    params: Any,
    config: ModelConfig,
    meta: Mapping[str, Any] | None = None,
    *,
    save_args: ocp.SaveArgs | None = None,
    use_ocdbt: bool = True,
) -> Path:
    """Save parameters with Orbax, without assets.

    Args:
      save_args: of every array.
    """
    ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=use_ocdbt)).save(
        directory / layout.PARAMS, params, save_args=jax.tree.map(lambda _: save_args, params) if save_args else None
    )
    described = arrays.describe({layout.PARAMS: params})
    (directory / layout.ASSETS).mkdir()
    content = {"model": dataclasses.asdict(config), "step": 0, **(meta or {}), "arrays": described, "assets": {}}
    (directory / layout.META).mkdir()
    _write(directory, content)
    return directory


def edit_meta(checkpoint: Path, **changes: Any) -> None:
    """Change values of a checkpoint's metadata, as if it had been saved so."""
    _write(checkpoint, layout.read_meta(checkpoint) | changes)


def _write(checkpoint: Path, meta: Mapping[str, Any]) -> None:
    (checkpoint / layout.METADATA).write_text(json.dumps(layout.with_crc(meta)))
