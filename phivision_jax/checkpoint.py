"""Our checkpoint directory, the same for a conversion and for a step of a training run.

    DIR/params/          every parameter, vision_tail included (Orbax: zarr in OCDBT)
    DIR/opt_state/       optimizer state; training only
    DIR/meta/metadata    JSON: {"format": 1, "model": …, "step": …, "plan": …, "run": …}
    DIR/assets/          tokenizer, chat template and whatever else a Hugging Face directory holds beside its weights

A training run keeps its steps under RUN/checkpoints/<step>/. Orbax writes a step under another name and renames it
when it is whole, so what bears a step's name is complete.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from phivision_jax.config import ModelConfig, read_json

FORMAT = 1
CHECKPOINTS = "checkpoints"
_PARAMS, _OPT_STATE, _META, _ASSETS = "params", "opt_state", "meta", "assets"


def is_checkpoint(path: Path) -> bool:
    return (path / _PARAMS).is_dir() and (path / _META / "metadata").is_file()


def find(path: str | Path) -> Path:
    """The checkpoint at ``path``: itself, or the newest step of the training run there.

    Raises:
      ValueError: when there is none.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    if is_checkpoint(path):
        return path
    for folder in (path, path / CHECKPOINTS):
        children = folder.iterdir() if folder.is_dir() else ()
        steps = [child for child in children if child.name.isdecimal() and is_checkpoint(child)]
        if steps:
            return max(steps, key=lambda child: int(child.name))
    raise ValueError(f"{path} is not a checkpoint of ours (no params/ and meta/metadata) and holds no training steps")


def read_meta(checkpoint: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The model's configuration, and everything else that ``meta/metadata`` says.

    Raises:
      ValueError: when the file is not one of ours, or of a later format.
    """
    path = checkpoint / _META / "metadata"
    meta = read_json(path)
    if meta.get("format") != FORMAT or not isinstance(meta.get("model"), dict):
        raise ValueError(f"{path}: format {meta.get('format')!r}; this version reads format {FORMAT}")
    return ModelConfig.from_dict(meta.pop("model")), meta


def assets_of(checkpoint: Path) -> Path:
    return checkpoint / _ASSETS


def restore_params(checkpoint: Path, target: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that ``target`` names, in its dtypes and shardings; others in the checkpoint are not read.

    Args:
      target: nested dict of ``jax.ShapeDtypeStruct`` (with shardings, or all go to one device).

    Raises:
      ValueError: when an array is missing or has another shape.
    """
    handler = ocp.PyTreeCheckpointHandler()
    restore_args = ocp.checkpoint_utils.construct_restore_args(target)
    with ocp.Checkpointer(handler) as checkpointer:
        found = checkpointer.metadata(checkpoint.absolute() / _PARAMS)
        _check_shapes(checkpoint, dict(found.item_metadata.tree), target)
        args = ocp.args.PyTreeRestore(item=target, restore_args=restore_args, partial_restore=True)
        return checkpointer.restore(checkpoint.absolute() / _PARAMS, args=args)


def _check_shapes(checkpoint: Path, found: Mapping[str, Any], target: Mapping[str, Any], prefix: str = "") -> None:
    for name, wanted in target.items():
        path = f"{prefix}{name}"
        if name not in found:
            raise ValueError(f"{checkpoint}: the model needs {path}, which the checkpoint does not hold")
        if isinstance(wanted, Mapping):
            _check_shapes(checkpoint, found[name], wanted, f"{path}/")
        elif tuple(found[name].shape) != tuple(wanted.shape):
            raise ValueError(f"{checkpoint}: {path} is {tuple(found[name].shape)}, the model's {tuple(wanted.shape)}")


class RunCheckpoints:
    """The checkpoints of one training run: saved in the background, the last few kept.

    Args:
      run: the run's directory.
      keep: how many steps to keep.
    """

    def __init__(self, run: Path, keep: int) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        names = (_PARAMS, _OPT_STATE, _META, _ASSETS)
        self._manager = ocp.CheckpointManager((run / CHECKPOINTS).absolute(), options=options, item_names=names)

    @property
    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, state: Mapping[str, Any], vision_tail: Any, meta: Mapping[str, Any], assets: Path) -> None:
        """Begin saving a state under its step; returns once its arrays are copied from the devices.

        Args:
          vision_tail: rides along in params/ (host arrays).
          meta: JSON values; "model" holds the configuration as a dict.
          assets: directory whose files are copied.
        """
        step = int(state["step"])
        params = {**state["params"], "vision_tail": vision_tail}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(params),
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
        params = dict(restored[_PARAMS])
        tail = params.pop("vision_tail")
        at = abstract_state["step"].sharding
        state = {"params": params, "opt_state": restored[_OPT_STATE], "step": jax.device_put(jax.numpy.int32(step), at)}
        return state, tail, restored[_META]

    def meta(self) -> dict[str, Any]:
        """What the newest step's ``meta/metadata`` says, before anything large is read."""
        step = self._manager.latest_step()
        return dict(self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))[_META])

    def close(self) -> None:
        """Wait until the last save is whole."""
        self._manager.wait_until_finished()
        self._manager.close()


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
