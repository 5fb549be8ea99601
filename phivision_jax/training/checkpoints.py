"""The checkpoints of a training run, written by Orbax in the background.

The format is ``phivision_jax/checkpoint.py``'s: each step can be loaded, scored and exported without its run.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from phivision_jax.checkpoint import ASSETS, CHECKPOINTS, FORMAT, META, OPT_STATE, PARAMS

CHUNK_BYTES = 32_000_000
"""The most that one stored chunk holds. Stacked arrays are also cut by layer, so that the converter can stream them."""


class RunCheckpoints:
    """The checkpoints of one training run: saved in the background, the last few kept.

    Args:
      run: the run's directory.
      keep: how many steps to keep.
    """

    def __init__(self, run: Path, keep: int) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        names = (PARAMS, OPT_STATE, META, ASSETS)
        self._manager = ocp.CheckpointManager((run / CHECKPOINTS).absolute(), options=options, item_names=names)

    @property
    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, state: Mapping[str, Any], vision_tail: Any, meta: Mapping[str, Any], assets: Path) -> None:
        """Begin saving a state under its step; returns once its arrays are copied from the devices.

        Args:
          vision_tail: rides along in params/.
          meta: JSON values; "model" holds the configuration as a dict.
          assets: directory whose files are copied.
        """
        step = int(state["step"])
        params = {**state["params"], "vision_tail": vision_tail}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(params, save_args=jax.tree_util.tree_map_with_path(_chunks, params)),
                opt_state=ocp.args.StandardSave(state["opt_state"]),
                meta=ocp.args.JsonSave({"format": FORMAT, "step": step, **meta}),
                assets=FilesSave(assets),
            ),
        )

    def restore(
        self, abstract_state: Mapping[str, Any], vision_tail: Any
    ) -> tuple[dict[str, Any], Any, dict[str, Any]]:
        """(state, vision_tail, meta) of the newest step, sharded as ``abstract_state`` says (on any mesh)."""
        step = self._manager.latest_step()
        params = {**abstract_state["params"], "vision_tail": vision_tail}
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(params),
                opt_state=ocp.args.StandardRestore(abstract_state["opt_state"]),
                meta=ocp.args.JsonRestore(),
            ),
        )
        params = dict(restored[PARAMS])
        tail = params.pop("vision_tail")
        at = abstract_state["step"].sharding
        state = {"params": params, "opt_state": restored[OPT_STATE], "step": jax.device_put(jnp.int32(step), at)}
        return state, tail, restored[META]

    def meta(self) -> dict[str, Any]:
        """What the newest step's ``meta/metadata`` says, before anything large is read."""
        step = self._manager.latest_step()
        return dict(self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))[META])

    def close(self) -> None:
        """Wait until the last save is whole."""
        self._manager.wait_until_finished()
        self._manager.close()


def _chunks(path: tuple, leaf: Any) -> ocp.SaveArgs:
    stacked = any(getattr(part, "key", None) == "layers" for part in path)
    return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if stacked else ())


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
