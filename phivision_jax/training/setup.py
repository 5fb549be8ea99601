"""What a training starts with: model, processor, plan, compiled shapes, the state to begin with.

Each is made once and taken again at every further start. Every error here comes before anything is trained.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from phivision_jax import sharding
from phivision_jax.batch import Batch, batch_spec
from phivision_jax.checkpoint import layout, loading, retention
from phivision_jax.checkpoint.manager import RunCheckpoints
from phivision_jax.config import ModelConfig
from phivision_jax.data.feed.encode import GROUP_NAMES, group_weights
from phivision_jax.data.feed.pipeline import BatchInfo, batches, rows_of_process, to_device
from phivision_jax.data.plan.plan import Plan, make_plan, plan_inputs
from phivision_jax.data.store.dataset import Dataset
from phivision_jax.distributed.processes import on_process_zero
from phivision_jax.evaluation.runner import Evaluator
from phivision_jax.io import storage
from phivision_jax.io.messages import first_difference
from phivision_jax.io.storage import Location
from phivision_jax.models import lora
from phivision_jax.models.vision_tail import VisionTail
from phivision_jax.processor import Processor
from phivision_jax.training import device_layout, optim, train_data
from phivision_jax.training.run_config import RunConfig
from phivision_jax.training.run_directory import CACHE, RunDirectory
from phivision_jax.training.step import State, TrainStep, init_params, make_train_step
from phivision_jax.training.validation import Validator


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A training before its first array: what every start of a run has in common."""

    cfg: RunConfig
    """With nothing left open."""
    processor: Processor
    assets: Path
    """The processor's files."""
    datasets: list[Dataset]
    plan: Plan
    steps: int
    step: TrainStep

    @property
    def spec(self) -> Batch:
        """Shapes of a batch, over all hosts."""
        data = self.cfg.data
        return batch_spec(data.batch_rows, data.row_shape(self.cfg.model), self.cfg.model.vision.patch_dim)

    def batches(self, first: int) -> Iterator[tuple[Batch, BatchInfo]]:
        """This host's rows of every step from the one after ``first`` to the last."""
        data = self.cfg.data
        at = self.step.batch_shardings(self.spec)
        return batches(
            self.datasets,
            self.plan,
            self.processor,
            batch_rows=data.batch_rows,
            rows_here=rows_of_process(at.tokens, data.batch_rows),
            start_step=first,
            end_step=self.steps,
            loss_weights=group_weights(data.loss_weights) if data.loss_weights else None,
            num_threads=data.num_threads,
        )

    def place(self, batch: Batch) -> Batch:
        """This host's rows on its devices, as a part of the global batch."""
        return to_device(batch, self.step.batch_shardings(self.spec), self.cfg.data.batch_rows)

    @property
    def vision_tail(self) -> Any:
        """Shapes of the part of a checkpoint that is never run, whole on every device."""
        tail = jax.eval_shape(lambda: VisionTail(self.cfg.model.vision, rngs=nnx.Rngs(self.cfg.seed)))
        return sharding.abstract(nnx.to_pure_dict(nnx.state(tail, nnx.Param)), sharding.replicated(self.step.mesh))

    def describe(self) -> str:
        count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(self.step.abstract_state["params"]))
        axes = " x ".join(f"{axis} {size}" for axis, size in self.step.mesh.shape.items() if size > 1)
        return f"{count:,} parameters on {axes or 'one device'}; plan {self.plan.hash[:12]}: {self.plan.summary()}"


def prepare(cfg: RunConfig, directory: RunDirectory, checkpoints: RunCheckpoints) -> Prepared:
    """Everything that needs no parameter; makes the run's processor files and plan where they are not there yet.

    Args:
      checkpoints: of this run; the newest that is whole says what its model is.

    Raises:
      ValueError: when something in the configuration, the data or an earlier start of this run does not fit.
    """
    keep_compilations(directory.url)
    cfg = device_layout.resolve(with_model(cfg, checkpoints), jax.devices())
    mesh = sharding.make_mesh(dataclasses.asdict(cfg.mesh))
    check_rows(cfg, mesh)
    retention.check(cfg)
    assets = directory.local / "assets"
    on_process_zero("assets", lambda: make_assets(cfg, directory))
    directory.take("assets")
    processor = Processor.from_directory(assets, cfg.model)
    mixture = train_data.training_mixture(cfg.data)
    datasets = [Dataset.open(path) for _, path in mixture.sources]
    plan = make_or_load_plan(cfg, mixture, datasets, processor, directory)
    steps = optim.num_steps(cfg, plan.num_steps(cfg.data.batch_rows))
    return Prepared(cfg, processor, assets, datasets, plan, steps, make_train_step(cfg, mesh, steps, len(GROUP_NAMES)))


def with_model(cfg: RunConfig, checkpoints: RunCheckpoints) -> RunConfig:
    """With the model of the checkpoint that training starts from: the run's own, else ``init_from``."""
    if not cfg.init_from:
        if cfg.model_from == "init_from":
            raise ValueError("init_from is empty: give --config.init_from=CHECKPOINT, the model to train further")
        return cfg
    if checkpoints.latest is not None:
        return cfg.with_model(ModelConfig.from_dict(checkpoints.meta()["model"]), "the run's own checkpoint")
    where = loading.locate(cfg.init_from)
    return cfg.with_model(loading.config_of(where), str(where))


def keep_compilations(run: Location) -> None:
    """Compiled programs are kept in the run's directory, unless JAX was told of another place (or of none)."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(storage.absolute(run) / CACHE))


def make_assets(cfg: RunConfig, directory: RunDirectory) -> None:
    """The processor's files: at the first start those of ``init_from``, or the project's small ones."""
    assets = directory.local / "assets"
    if not assets.exists():
        partial = assets.with_name(".assets.partial")
        shutil.rmtree(partial, ignore_errors=True)
        if cfg.init_from:
            loading.copy_assets(loading.locate(cfg.init_from), partial)
        else:
            Processor.small(cfg.model).save(partial)
        partial.rename(assets)
    directory.give("assets")


def check_rows(cfg: RunConfig, mesh: jax.sharding.Mesh) -> None:
    """Rows are split over the slice, data and fsdp axes, in training and in evaluation, where there is one."""
    with sharding.override_rules(cfg.rules):
        parts = sharding.num_shards(mesh, "batch")
    evaluated = {"eval_batch": cfg.eval_batch} if cfg.data.eval_path else {}
    for name, rows in ({"data.batch_rows": cfg.data.batch_rows} | evaluated).items():
        if rows % parts:
            raise ValueError(
                f"{name} is {rows}, which does not divide over {parts} devices (mesh axes slice, data and fsdp); "
                f"take a multiple of {parts}, or set mesh.fsdp"
            )


def make_or_load_plan(
    cfg: RunConfig, mixture: train_data.Mixture, datasets: list[Dataset], processor: Processor, directory: RunDirectory
) -> Plan:
    """The run's plan: made at the first start, or taken from ``data.plan``; the same at every other start."""
    data = cfg.data
    settings: dict[str, Any] = {
        "shape": data.row_shape(processor.config),
        "batch_rows": data.batch_rows,
        "seed": data.seed,
        "on_overflow": data.on_overflow,
    }
    where = directory.local / "plan"
    if not where.exists() and not data.plan:
        plan = make_plan(datasets, mixture, processor, **settings, progress=jax.process_index() == 0)
    else:
        found = where if where.exists() else Path(data.plan)
        plan, now = Plan.load(found), plan_inputs(datasets, mixture, processor, **settings)
        if changed := first_difference(now, plan.inputs):
            raise ValueError(
                f"{found} is another plan than this configuration's: {changed}; keep data, tokenizer, patch settings, "
                "row sizes and seed as they were, or take a new --run directory"
            )

    def save() -> None:
        if not where.exists():
            plan.save(where)
        directory.give("plan")

    # All look before one of them saves it.
    on_process_zero("plan is made", lambda: None)
    on_process_zero("plan is saved", save)
    return plan


def make_evaluator(made: Prepared) -> Evaluator | None:
    cfg = made.cfg
    if not cfg.data.eval_path:
        return None
    return Evaluator(
        Dataset.open(cfg.data.eval_path),
        made.processor,
        rows=cfg.eval_batch,
        max_new_tokens=cfg.max_new_tokens,
        num_examples=cfg.eval_examples or None,
        mesh=made.step.mesh,
    )


def make_validator(made: Prepared) -> Validator | None:
    found = train_data.validation_plan(made.cfg.data, made.processor, made.datasets)
    return found and Validator(made.cfg, made.step, *found, made.processor)


def start(
    made: Prepared, checkpoints: RunCheckpoints, say: Callable[[str], None], at_most: int | None = None
) -> tuple[State, Any]:
    """The state to begin with: this run's newest checkpoint, else ``init_from``, else random; and the vision tail.

    Args:
      at_most: the newest step that is wanted; see ``RunCheckpoints.restore``.
    """
    cfg, step = made.cfg, made.step
    if checkpoints.has(at_most):
        state, tail, meta = checkpoints.restore(
            step.abstract_state, made.vision_tail, at_most=at_most, check=lambda meta: check_unchanged(made, meta, say)
        )
        say(f"continuing from step {meta['step']}")
        return state, tail
    if cfg.init_from:
        base = lora.without(step.abstract_state["params"])
        where = loading.locate(cfg.init_from)
        params = loading.read_params(where, cfg.model, base | {"vision_tail": made.vision_tail})
        tail = params.pop("vision_tail")
        return step.init(init_params(cfg, step, params)), tail
    make_tail = jax.jit(
        lambda: nnx.to_pure_dict(nnx.state(VisionTail(cfg.model.vision, rngs=nnx.Rngs(cfg.seed)), nnx.Param)),
        out_shardings=sharding.replicated(step.mesh),
    )
    return step.init(init_params(cfg, step)), make_tail()


def check_unchanged(made: Prepared, meta: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """A run goes on only with what decides its numbers as it was. What it is guarded by may change, and is said.

    Args:
      meta: of the checkpoint that training goes on from.

    Raises:
      ValueError: naming the first field that differs.
    """

    def decides(cfg: Mapping[str, Any]) -> dict[str, Any]:
        values = {name: cfg.get(name) for name in ("model", "optim", "lora", "dtype", "seed")}
        return values | {"data": {"loss_weights": cfg.get("data", {}).get("loss_weights")}}

    now, before = json.loads(json.dumps(dataclasses.asdict(made.cfg))), meta["run"]
    if changed := first_difference(decides(now), decides(before)):
        raise ValueError(f"{changed}: this run was started otherwise; keep it as it was, or take a new --run")
    if meta["plan"] != made.plan.hash:
        raise ValueError(
            f"the run's checkpoint {meta['step']} was trained with plan {meta['plan'][:12]}, and its plan/ is now "
            f"{made.plan.hash[:12]}: bring back the one that was there, or take a new --run"
        )
    for name, here in (("guard", now["guard"]), ("code", layout.code_version())):
        if name in {**before, **meta} and (was := {**before, **meta}[name]) != here:
            say(f"{name} is {here}, and was {was} when checkpoint {meta['step']} was written")
