"""The checkpoints of a training run, written by Orbax in the background, and the way back when one is damaged.

The format is ``phivision_jax/checkpoint/layout.py``'s: each step can be loaded, scored and exported without its run.

    device ─► checksum per array ─► Orbax: copy, write, rename to <step> ─► read every file ─► MANIFEST, sealed.json
              (in meta)                          └────────────────────── in the background ──────────────────────┘

Two nets, because each has a hole where the other holds. Array checksums are taken before anything is copied and
compared when the arrays stand on the devices again: they see what went wrong on the way to the disk, which no reading
of files can. The manifest sees a change in any byte of any file later on, also where no array is concerned.

The manifest can only be made from finished files, so for a while a step is whole for Orbax and has none. Killed then,
the step is good and must not be lost: without a manifest it is restored on its array checksums alone, and sealed after
that. A manifest that was there and is gone is damage; ``checkpoints/sealed.json`` tells the two apart. It is written
after the manifest and only ever makes the check stricter, so no single accident with it harms.

A damaged step is renamed to ``checkpoints/damaged-<step>`` as soon as an earlier one is restored: out of the way of
training, which will save this step again, and there for whoever wants to look. When nothing is whole, nothing is
touched and nothing is trained.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from phivision_jax.checkpoint import manifest
from phivision_jax.checkpoint.checksums import checksums, differing
from phivision_jax.checkpoint.files_item import FilesSave
from phivision_jax.checkpoint.layout import ASSETS, CHECKPOINTS, CHECKSUMS, FORMAT, META, OPT_STATE, PARAMS
from phivision_jax.checkpoint.retention import Best
from phivision_jax.checkpoint.run_steps import Steps, first_line
from phivision_jax.distributed.processes import first_error
from phivision_jax.io import storage
from phivision_jax.io.storage import Location

CHUNK_BYTES = 32_000_000
"""The most that one stored chunk holds. Stacked arrays are also cut by layer, so that the converter can stream them."""
_UNREADABLE = "Orbax cannot restore it here"


class CheckpointError(ValueError):
    """A checkpoint could not be written, or none could be restored; the message is a sentence for the user."""


class RunCheckpoints:
    """The checkpoints of one training run: saved in the background, kept by rule.

    Args:
      run: the run's directory, or its place in a bucket.
      keep: the last so many steps are kept.
      keep_every: multiples of this are kept as well; 0: none.
      keep_best: the step with the best value of this metric is kept as well: "eval/accuracy" keeps the highest, a
        minus in front ("-loss") the lowest; empty: none.
      say: told what happens to damaged checkpoints, on the first process.
      before_save: brings into safety what a checkpoint must not be without, once it is there.

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
        say: Callable[[str], None] = print,
        before_save: Callable[[], None] = lambda: None,
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep_checkpoints is {keep}; at least 1 is needed, 2 to survive a damaged one")
        self._directory = storage.absolute(run) / CHECKPOINTS
        self._steps = Steps(self._directory)
        self._keep, self._keep_every, self._say = keep, keep_every, say
        self._best = Best(keep_best, self._tell) if keep_best else None
        self._before_save = before_save
        self._first = jax.process_index() == 0
        self._damaged: dict[int, str] = {}
        self._checked: set[int] = set()
        self._sealing: threading.Thread | None = None
        self._error: tuple[int, BaseException] | None = None
        self._manager: ocp.CheckpointManager | None = None
        if self._first:
            if isinstance(self._directory, Path):
                self._directory.mkdir(parents=True, exist_ok=True)
            manifest.sweep(self._directory)

    @property
    def latest(self) -> int | None:
        """The newest step on disk, whole or not; None: nothing was ever saved here.

        Raises:
          CheckpointError: when something was, and no step is left.
        """
        steps = self._steps()
        if not steps and (gone := self._steps.sealed()):
            raise CheckpointError(
                f"{self._directory} held checkpoint {max(gone)} and now holds none; bring it back, or take a new "
                "--run to begin anew"
            )
        return max(steps, default=None)

    def has(self, at_most: int | None = None) -> bool:
        """Whether there is a step, whole or not, that is not newer than that; raises as ``latest``."""
        return self.latest is not None and any(at_most is None or step <= at_most for step in self._steps())

    # -----------------------------------------------------------------------------------------------------------------
    # Saving.

    def save(
        self,
        state: Mapping[str, Any],
        vision_tail: Any,
        meta: Mapping[str, Any],
        assets: Path,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Begin saving a state under its step; returns once its arrays are copied from the devices.

        Args:
          vision_tail: rides along in params/.
          meta: JSON values; "model" holds the configuration as a dict.
          assets: directory whose files are copied.
          metrics: ``keep_best`` is looked up in it; a step whose metrics lack it is not among the best.

        Raises:
          CheckpointError: when this save cannot begin, or the one before has failed meanwhile.
        """
        self.wait()
        step = int(state["step"])
        try:
            self._before_save()
        except OSError as error:
            raise self._failed(step, error) from error
        if isinstance(self._directory, Path) and not self._directory.is_dir():
            raise CheckpointError(
                f"{self._directory} has disappeared while training: checkpoint {step} is not saved, and those before "
                "it are gone; bring the directory or its disk back and start again"
            )
        params = {**state["params"], "vision_tail": vision_tail}
        sums = checksums({PARAMS: params, OPT_STATE: state["opt_state"]})
        meta = {"format": FORMAT, "step": step, **meta, CHECKSUMS: {name: f"{s:08x}" for name, s in sums.items()}}
        try:
            if self._manager is None:
                self._manager = self._make_manager()
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(params, save_args=jax.tree_util.tree_map_with_path(_chunks, params)),
                    opt_state=ocp.args.StandardSave(state["opt_state"]),
                    meta=ocp.args.JsonSave(meta),
                    assets=FilesSave(assets),
                ),
                metrics=self._best.rating(step, metrics or {}) if self._best else None,
            )
        except Exception as error:  # of the file system, of TensorStore, of Orbax: each with its own types
            raise self._failed(step, error) from error
        self._seal(step)

    def _make_manager(self) -> ocp.CheckpointManager:
        """Made at the first save, when all that is damaged has been put aside: it reads what it finds."""
        rules: list[Any] = [policies.LatestN(self._keep)]
        if self._keep_every:
            rules.append(policies.EveryNSteps(self._keep_every))
        if self._best:
            rules.append(self._best)
            self._set_aside_unrated(self._best)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(rules),
            # Decides nothing beside a policy, but without it metrics are not stored.
            best_fn=self._best.score if self._best else None,
            cleanup_tmp_directories=True,
            # In the background, where they are made by default, a failure would leave this thread waiting for them.
            async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
        )
        names = (PARAMS, OPT_STATE, META, ASSETS)
        return ocp.CheckpointManager(self._directory, options=options, item_names=names)

    def _set_aside_unrated(self, best: Best) -> None:
        """An older step whose metric cannot be read would keep Orbax's manager from starting."""
        for step in self._steps() if self._first else ():
            path = self._directory / str(step) / "metrics" / "metrics"
            try:
                with storage.wrap_storage_errors(path):
                    rating = path.read_bytes() if path.exists() else None
                if rating is not None:
                    best.score(json.loads(rating))
            except (ValueError, TypeError):
                self._damaged[step] = "its file metrics/metrics is damaged"
        self._set_aside()

    def _seal(self, step: int) -> None:
        self._sealing = threading.Thread(target=self._seal_when_written, args=(step,), name=f"seal-{step}")
        self._sealing.start()

    def _seal_when_written(self, step: int) -> None:
        try:
            if self._manager is not None:
                self._manager.wait_until_finished()
            manifest.seal(self._directory, step, jax.process_index(), jax.process_count())
        except BaseException as error:  # raised in the thread that trains, by wait()
            self._error = (step, error)

    def wait(self) -> None:
        """Wait until the last save is whole and sealed.

        Raises:
          CheckpointError: when it failed.
        """
        if self._sealing is None:
            return
        self._sealing.join()
        self._sealing = None
        if self._error is not None:
            (step, error), self._error = self._error, None
            try:  # Orbax tells each thread; this one is told here, not at some later save
                if self._manager is not None:
                    self._manager.wait_until_finished()
            except Exception as same:
                error = same
            raise self._failed(step, error) from error

    def check(self) -> None:
        """Raise what ``wait`` would, without waiting: for a loop to learn early that a save has failed."""
        if self._sealing is not None and not self._sealing.is_alive():
            self.wait()

    def _failed(self, step: int, error: BaseException) -> CheckpointError:
        if isinstance(error, CheckpointError):
            return error
        lost, where = f"checkpoint {step} could not be written to {self._directory}", "bucket"
        if isinstance(self._directory, Path):
            lost += "" if self._directory.is_dir() else " (the directory has disappeared)"
            where = "disk"
        return CheckpointError(
            f"{lost}: {first_line(error)}; see to the {where} and start again: training goes on from the checkpoint "
            "before"
        )

    def close(self) -> None:
        """Wait until the last save is whole and sealed.

        Raises:
          CheckpointError: when it failed.
        """
        self.wait()
        if self._manager is not None:
            self._manager.close()

    # -----------------------------------------------------------------------------------------------------------------
    # Restoring.

    def meta(self) -> dict[str, Any]:
        """What ``meta/metadata`` says in the newest step whose files are whole, before anything large is read.

        Raises:
          CheckpointError: when there is no such step.
        """
        return self._steps.meta(self._newest())

    def restore(
        self,
        abstract_state: Mapping[str, Any],
        vision_tail: Any,
        *,
        at_most: int | None = None,
        check: Callable[[Mapping[str, Any]], None] = lambda meta: None,
    ) -> tuple[dict[str, Any], Any, dict[str, Any]]:
        """(state, vision_tail, meta) of the newest whole step, sharded as ``abstract_state`` says (on any mesh).

        Newer ones, which are not whole, are put aside, and ``say`` is told why.

        Args:
          at_most: the newest that is wanted; the directory is then left as it is.
          check: raises what speaks against a step, by its meta, before any array of it is read.

        Raises:
          CheckpointError: when none is whole, saying of each what is wrong; when one is, but holds other arrays than
            are asked for.
        """
        params = {**abstract_state["params"], "vision_tail": vision_tail}
        while True:
            step = self._newest(at_most)
            meta = self._steps.meta(step)
            check(meta)
            restored, wrong = self._read(step, params, abstract_state["opt_state"], meta)
            if wrong is None:
                break
            del restored  # two states at once may not fit
            self._damaged[step] = wrong
        if at_most is None:
            self._set_aside(step)
        if CHECKSUMS not in meta:
            self._tell(f"checkpoint {step} was written without checksums; it is taken as it is")
        if at_most is None and not self._steps.has_manifest(step):
            self._seal(step)
        params = dict(restored[PARAMS])
        tail = params.pop("vision_tail")
        at = abstract_state["step"].sharding
        state = {"params": params, "opt_state": restored[OPT_STATE], "step": jax.device_put(jnp.int32(step), at)}
        return state, tail, meta

    def _newest(self, at_most: int | None = None) -> int:
        """The newest step in which no damage has been found, its files read."""
        wanted = [step for step in self._steps() if at_most is None or step <= at_most]
        share = (jax.process_index(), jax.process_count())
        for step in sorted(set(wanted) - self._damaged.keys(), reverse=True):
            if step not in self._checked and (wrong := first_error(self._steps.damage(step, *share))):
                self._damaged[step] = wrong
                continue
            self._checked.add(step)
            return step
        if not self._damaged:
            raise CheckpointError(f"{self._directory} holds no checkpoint")
        each = "; ".join(f"in {step}, {wrong}" for step, wrong in sorted(self._damaged.items(), reverse=True))
        raise CheckpointError(
            f"{self._directory} holds no checkpoint that is whole: {each}. Nothing was changed. Bring back a copy of "
            "one, or take a new --run to begin anew"
        )

    def _read(self, step: int, params: Any, opt_state: Any, meta: Mapping[str, Any]) -> tuple[Any, str | None]:
        """The restored items, and what is wrong with them."""
        checkpoint = self._directory / str(step)
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(params), opt_state=ocp.args.StandardRestore(opt_state)
        )
        restored: Any = None
        wrong = None
        try:
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
                restored = checkpointer.restore(checkpoint, args=items)
        except Exception as error:  # Orbax's, TensorStore's, JAX's: each has its own types
            storage.check(checkpoint)  # a bucket that does not answer is no damage
            wrong = f"{_UNREADABLE}: {first_line(error)}"
        if wrong is None and CHECKSUMS in meta:
            found = checksums({PARAMS: restored[PARAMS], OPT_STATE: restored[OPT_STATE]})
            wrong = differing(meta[CHECKSUMS], {name: f"{value:08x}" for name, value in found.items()})
        wrong = first_error(wrong)
        if wrong is not None and wrong.startswith(_UNREADABLE) and self._steps.has_manifest(step):
            raise CheckpointError(f"every file of {checkpoint} is whole, but {wrong}")
        return restored, wrong

    def _set_aside(self, restored: int | None = None) -> None:
        """Rename what is damaged, out of the sight of Orbax and of ``checkpoint.find``."""
        for step, wrong in sorted(self._damaged.items()):
            name = self._steps.set_aside(step) if self._first else ""
            after = "" if restored is None else f"; training goes on from {restored}"
            self._tell(f"checkpoint {step} is damaged: {wrong}. It is now {CHECKPOINTS}/{name}{after}")
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints are aside")
        self._damaged.clear()

    def _tell(self, sentence: str) -> None:
        if self._first:
            self._say(sentence)


def _chunks(path: tuple, leaf: Any) -> ocp.SaveArgs:
    stacked = any(getattr(part, "key", None) == "layers" for part in path)
    return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if stacked else ())
