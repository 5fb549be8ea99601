"""The checkpoints of a training run: saved by Orbax in the background, restored from the newest intact step.

The format is described in ``layout.py``; each step can be loaded, evaluated and exported without its run.

    device ─► checksum of each array ─► Orbax: copy, write, rename to <step> ─► saved.json
              (into the metadata)       └────────── in the background ───────┘

A step's metadata hold the checksums of all that it consists of and are written with it. So a step that a kill has
interrupted is invisible, a complete one can be verified, and there is no state in between. Restoring verifies the files
before anything large is read, and the arrays on the devices: that includes what went wrong between device and disk.

A damaged step is renamed to ``checkpoints/damaged-<step>`` as soon as an earlier one is restored: training will save
this step again, and the damaged one can still be examined. When no step is intact, nothing is changed and nothing is
trained.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from phivision_jax.checkpoint import arrays, layout
from phivision_jax.checkpoint.layout import ASSETS, CHECKPOINTS, META, OPT_STATE, PARAMS, DamagedError
from phivision_jax.checkpoint.retention import KeepBest
from phivision_jax.distributed.processes import first_error
from phivision_jax.io import storage
from phivision_jax.io.messages import first_line
from phivision_jax.io.storage import Location

CHUNK_BYTES = 32_000_000
"""The largest stored chunk. Stacked arrays are also cut by layer, so that the converter can stream them."""


type Tree = Mapping[str, Any]
"""Nested arrays, their shapes, or JSON values."""


class CheckpointError(ValueError):
    """A checkpoint could not be written, or none could be restored; the message is a sentence for the user."""


class RunCheckpoints:
    """The checkpoints of one training run.

    Args:
      run: the run's directory, or its place in a bucket.
      keep: number of newest steps to keep.
      keep_every: steps that are multiples of this are kept too; 0: none.
      keep_best: the step with the best value of this metric is kept too: "eval/accuracy" keeps the highest, a minus in
        front ("-loss") the lowest; empty: none.
      log: receives messages about damaged checkpoints, on the first process.
      before_save: called before a step is written, to store first what a checkpoint must not exist without.
      create: False to write nothing, not even an empty directory, before the first save.

    Raises:
      ValueError: when ``keep`` is not positive.
      StorageError: when the bucket cannot be read.
    """

    def __init__(
        self,
        run: Location,
        keep: int,
        keep_every: int = 0,
        keep_best: str = "",
        log: Callable[[str], None] = print,
        before_save: Callable[[], None] = lambda: None,
        create: bool = True,
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep_checkpoints is {keep}; at least 1 is needed, 2 to survive a damaged one")
        self._first = jax.process_index() == 0
        self._log = log if self._first else lambda line: None
        self._directory = storage.location(run) / CHECKPOINTS
        self._keep, self._keep_every = keep, keep_every
        self._best = KeepBest(keep_best, self._log) if keep_best else None
        self._before_save = before_save
        self._damaged: dict[int, str] = {}
        self._intact: dict[int, dict[str, Any]] = {}
        """Metadata of the steps whose files were verified."""
        self._saving: int | None = None
        self._manager: ocp.CheckpointManager | None = None
        if create and self._first and isinstance(self._directory, Path):
            self._directory.mkdir(parents=True, exist_ok=True)

    def steps(self, at_most: int | None = None) -> list[int]:
        """The steps, intact or not, that are not newer than ``at_most``; empty when nothing was ever saved.

        Raises:
          CheckpointError: when something was saved and no step is left.
        """
        steps = layout.list_steps(self._directory)
        if not steps and (saved := layout.newest_saved(self._directory)) is not None:
            lost = f"{self._directory} held checkpoint {saved} and now holds none"
            raise CheckpointError(f"{lost}; bring it back, or use a new --run to start over")
        return [step for step in steps if at_most is None or step <= at_most]

    # -----------------------------------------------------------------------------------------------------------------
    # Saving.

    def save(self, state: Tree, vision_tail: Any, meta: Tree, assets: Path, metrics: Tree | None = None) -> None:
        """Begin saving a state under its step; returns once its arrays are copied from the devices.

        Args:
          state: {"params", "opt_state", "step"}.
          vision_tail: parameters that are stored with the others but are never trained.
          meta: JSON values; "model" holds the configuration as a dict.
          assets: directory whose files are copied.
          metrics: of this step; ``keep_best`` rates it by them.

        Raises:
          CheckpointError: when this save cannot begin, or the previous one has failed.
        """
        self.wait()
        step = int(state["step"])
        metrics = {name: float(value) for name, value in (metrics or {}).items() if math.isfinite(value)}
        params = {**state["params"], "vision_tail": vision_tail}
        try:
            self._before_save()
            if isinstance(self._directory, Path) and not self._directory.is_dir():
                lost = f"has disappeared during training: checkpoint {step} is not saved, and those before it are gone"
                raise CheckpointError(f"{self._directory} {lost}; bring it or its disk back and start again")
            described = arrays.describe({PARAMS: params, OPT_STATE: state["opt_state"]})
            content = {"step": step, **meta, "metrics": metrics, "arrays": described}
            content["assets"] = layout.crc_of_files(assets)
            self._manager = self._manager or self._make_manager()
            if self._best:
                self._best.add(step, metrics)
                self._best.report_missing(step, metrics)
            self._saving = step
            saved = ocp.args.StandardSave(params, save_args=jax.tree_util.tree_map_with_path(_chunks, params))
            items: dict[str, Any] = {PARAMS: saved, OPT_STATE: ocp.args.StandardSave(state["opt_state"])}
            items |= {META: ocp.args.JsonSave(layout.with_crc(content)), ASSETS: FilesSave(assets)}
            self._manager.save(step, args=ocp.args.Composite(**items))
        except Exception as error:  # of the file system, TensorStore, Orbax: each with its own types
            self._saving = None
            raise self._failure(step, error) from error

    def _make_manager(self) -> ocp.CheckpointManager:
        """Made at the first save, when damaged steps have been set aside."""
        arrays.silence_libraries()
        rules: list[Any] = [policies.LatestN(self._keep)]
        if self._keep_every:
            rules.append(policies.EveryNSteps(self._keep_every))
        if self._best:
            rules.append(self._best)
            for step in layout.list_steps(self._directory):
                try:
                    meta = self._intact.get(step) or layout.read_meta(self._directory / str(step))
                    self._best.add(step, meta["metrics"])
                except DamagedError as error:
                    self._damaged[step] = error.problem
            self._set_aside()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(rules),
            cleanup_tmp_directories=True,
            lightweight_initialize=True,  # the records that Orbax would read are not verified
            # In the background, where they are made by default, a failure would leave this thread waiting for them.
            async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
        )
        names = (PARAMS, OPT_STATE, META, ASSETS)
        return ocp.CheckpointManager(self._directory, options=options, item_names=names)

    def wait(self) -> None:
        """Wait until the last save is complete.

        Raises:
          CheckpointError: when it failed.
        """
        step, self._saving = self._saving, None
        if step is None or self._manager is None:
            return
        try:
            self._manager.wait_until_finished()
            if self._first:
                layout.record_saved(self._directory, step)
        except Exception as error:
            raise self._failure(step, error) from error

    def check(self) -> None:
        """Raise what ``wait`` would, without waiting, so that a loop learns early of a failed save."""
        if self._manager is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def _failure(self, step: int, error: BaseException) -> CheckpointError:
        if isinstance(error, CheckpointError):
            return error
        where = "disk" if isinstance(self._directory, Path) else "bucket"
        remedy = f"check the {where} and start again: training continues from the checkpoint before"
        problem = f"checkpoint {step} could not be written to {self._directory}"
        return CheckpointError(f"{problem}: {first_line(error)}; {remedy}")

    def close(self) -> None:
        """Wait until the last save is complete, and release Orbax's threads.

        Raises:
          CheckpointError: when the save failed.
        """
        self.wait()
        if self._manager is not None:
            self._manager.close()

    # -----------------------------------------------------------------------------------------------------------------
    # Restoring.

    def meta(self) -> dict[str, Any]:
        """The metadata of the newest step whose files are intact.

        Raises:
          CheckpointError: when there is no such step.
        """
        return next(self._intact_steps())[1]

    def restore(
        self, shapes: Tree, tail: Any, *, at_most: int | None = None, check: Callable[[Tree], None] = lambda _: None
    ) -> tuple[dict[str, Any], Any, dict[str, Any]]:
        """(state, vision_tail, meta) of the newest intact step, sharded as ``shapes`` (on any mesh).

        Newer steps, which are damaged, are set aside and reported to ``log``.

        Args:
          shapes: like the state, of ``jax.ShapeDtypeStruct``; dtypes are those that were saved.
          tail: the same for the vision tail.
          at_most: the newest step wanted; the directory is then left unchanged.
          check: raises when a step with these metadata must not be restored; called before any array is read.

        Raises:
          CheckpointError: when no step is intact, with what is wrong with each; when the step has other arrays.
        """
        targets = {PARAMS: {**shapes["params"], "vision_tail": tail}, OPT_STATE: shapes["opt_state"]}
        restored: dict[str, Any] = {}
        for step, meta in self._intact_steps(at_most):
            check(meta)
            self._check_arrays(step, targets)
            try:
                for item, target in targets.items():
                    saved = layout.arrays_of(meta, item)
                    restored[item] = arrays.restore(self._directory / str(step), item, target, saved)
                break
            except DamagedError as error:
                self._damaged[step] = error.problem
                restored.clear()  # two states at once may not fit
        if at_most is None:
            self._set_aside(step)
        params = dict(restored[PARAMS])
        tail = params.pop("vision_tail", {})  # early fusion has none
        number = jax.device_put(jnp.int32(step), shapes["step"].sharding)
        return {"params": params, "opt_state": restored[OPT_STATE], "step": number}, tail, meta

    def _intact_steps(self, at_most: int | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
        """Steps whose files are intact, and their metadata, from the newest on; raises when there are no more."""
        for step in sorted(set(self.steps(at_most)) - self._damaged.keys(), reverse=True):
            path, problem = self._directory / str(step), None
            try:
                with storage.wrap_storage_errors(path):
                    if not layout.is_committed(path):
                        raise DamagedError(path, f"its file {layout.ORBAX_MARK} is missing")
                    if lost := [item for item in (PARAMS, OPT_STATE) if not (path / item).exists()]:
                        raise DamagedError(path, f"its {lost[0]}/ cannot be found")
                self._intact[step] = self._intact.get(step) or layout.read_meta(path, assets=self._first)
            except DamagedError as error:
                problem = error.problem
            if problem := first_error(problem):
                self._damaged[step] = problem
            else:
                yield step, self._intact[step]
        if not self._damaged:
            raise CheckpointError(f"{self._directory} holds no checkpoint")
        each = "; ".join(f"in {step}, {problem}" for step, problem in sorted(self._damaged.items(), reverse=True))
        remedy = "Nothing was changed. Bring back a copy of one, or use a new --run to start over"
        raise CheckpointError(f"{self._directory} holds no intact checkpoint: {each}. {remedy}")

    def _check_arrays(self, step: int, targets: Tree) -> None:
        saved = self._intact[step]["arrays"]
        wanted = {path: [str(leaf.dtype), list(leaf.shape)] for path, leaf in arrays.with_paths(targets).items()}
        for path in sorted(saved.keys() | wanted.keys()):
            has, asked = saved.get(path, [])[:2], wanted.get(path, [])
            if has != asked:
                other = f"its array {path} is {has or 'missing'}, here {asked or 'there is none'}"
                raise CheckpointError(f"{self._directory / str(step)} is intact, but does not fit this run: {other}")

    def _set_aside(self, restored: int | None = None) -> None:
        """Rename damaged steps, so that neither Orbax nor ``layout.find`` sees them."""
        after = "" if restored is None else f"; training continues from {restored}"
        for step, problem in sorted(self._damaged.items()):
            if self._first:
                name = layout.set_aside(self._directory, step)
                self._log(f"checkpoint {step} is damaged: {problem}. It is now {CHECKPOINTS}/{name}{after}")
        multihost_utils.sync_global_devices("damaged checkpoints are set aside")
        self._damaged.clear()


def _chunks(path: tuple, leaf: Any) -> ocp.SaveArgs:
    stacked = any(getattr(part, "key", None) == "layers" for part in path)
    return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if stacked else ())


class FilesHandler(ocp.CheckpointHandler):
    """Copies a directory of plain files into a step, so that it can be loaded and exported without its run."""

    def save(self, directory: Any, args: FilesSave) -> None:
        target = storage.location(os.fspath(directory))
        if jax.process_index() == 0 and isinstance(target, Path):
            shutil.copytree(args.source, target, dirs_exist_ok=True)
        elif jax.process_index() == 0:
            storage.upload(args.source, target)

    def restore(self, directory: Any, args: Any = None) -> None:
        raise NotImplementedError("files are read where they are")


@ocp.args.register_with_handler(FilesHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class FilesSave(ocp.args.CheckpointArgs):
    """Argument of a save: the directory to copy."""

    source: Path
