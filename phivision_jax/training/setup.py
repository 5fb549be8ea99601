"""Prepare a start of a run: model, processor, plan, compiled shapes, and the state that training begins with.

``check`` finds the mistakes that neither a plan nor a compiler is needed for, before the run has a file. Every start of
a run prepares the same. Errors here come before any training.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from phivision_jax import sharding
from phivision_jax.checkpoint import layout, loading, retention
from phivision_jax.checkpoint.manager import RunCheckpoints
from phivision_jax.config import ModelConfig
from phivision_jax.data.feed import encode
from phivision_jax.data.plan.plan import Plan, make_plan, plan_inputs
from phivision_jax.data.store.dataset import Dataset
from phivision_jax.distributed.processes import on_process_zero
from phivision_jax.evaluation.benchmark import Benchmark, Item
from phivision_jax.evaluation.choice import choose
from phivision_jax.evaluation.dataset import DatasetBenchmark
from phivision_jax.evaluation.periodic import Evaluator
from phivision_jax.evaluation.task import Sampling
from phivision_jax.io import atomic, storage
from phivision_jax.io.messages import Log, first_difference
from phivision_jax.models import lora, remat, siglip2
from phivision_jax.processor import Processor
from phivision_jax.training import device_layout, optim, train_data
from phivision_jax.training.run_config import ResolvedConfig, RunConfig
from phivision_jax.training.run_directory import CACHE, MADE_AT_START, RunDirectory
from phivision_jax.training.step import State, TrainStep, check_divisible, init_params, make_train_step
from phivision_jax.training.telemetry import metrics, profiling
from phivision_jax.training.validation import Validator

Checked = tuple[ResolvedConfig, jax.sharding.Mesh, list[Dataset], Sequence[str]]
"""A checked configuration, its mesh, the datasets of the training data, and the groups by which losses are measured."""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A run before its first array."""

    cfg: ResolvedConfig
    processor: Processor
    assets: Path
    """Directory of the processor's files."""
    datasets: list[Dataset]
    plan: Plan
    steps: int
    step: TrainStep
    feed: train_data.Feed

    def make_vision_tail(self) -> dict[str, Any]:
        """Random parameters of the part of a checkpoint that never runs; empty without an encoder."""
        if not self.cfg.model.vision.has_blocks:
            return {}
        tail = siglip2.VisionTail(self.cfg.model.vision, rngs=nnx.Rngs(self.cfg.seed))
        return nnx.to_pure_dict(nnx.state(tail, nnx.Param))

    @property
    def vision_tail(self) -> Any:
        """Shapes of that part, replicated over the devices."""
        return sharding.abstract(jax.eval_shape(self.make_vision_tail), sharding.replicated(self.step.mesh))

    def describe(self) -> str:
        trained, frozen = optim.partition(self.step.abstract_state["params"], self.cfg.optim)
        sizes = [sum(int(np.prod(leaf.shape)) for leaf in leaves.values()) for leaves in (trained, frozen)]
        axes = " x ".join(f"{axis} {size}" for axis, size in self.step.mesh.shape.items() if size > 1)
        line = f"{sizes[0]:,} of {sum(sizes):,} parameters train on {axes or 'one device'}"
        if self.cfg.data.validation_share:
            mixture, seed = train_data.training_mixture(self.cfg.data), self.cfg.data.seed
            held_out = sum(int((~mixture.eligible(len(dataset), seed)).sum()) for dataset in self.datasets)
            line += f"; {held_out:,} of {sum(map(len, self.datasets)):,} records are held out for validation"
        return f"{line}\nplan {self.plan.hash[:12]}: {self.plan.summary()}"


def check(cfg: RunConfig, run: str) -> Checked:
    """Check what needs neither the plan nor a compiled program. Writes nothing.

    Args:
      run: the run's directory, or ``gs://…``; its newest complete checkpoint determines the model.

    Raises:
      ValueError: when the configuration, the data and earlier starts of this run do not fit together.
      FileNotFoundError: when a dataset is missing.
    """
    names = {child.name for child in storage.children(storage.location(run))}
    held = names & {layout.CONFIG, *MADE_AT_START}  # which a start writes or makes again
    if held and not names & {layout.COMMAND, layout.CHECKPOINTS}:
        raise ValueError(f"{run} holds {', '.join(sorted(held))}, but no run: use another --run, or remove that first")
    checkpoints = RunCheckpoints(storage.location(run), cfg.keep_checkpoints, create=False)
    resolved = device_layout.resolve(with_checkpoint(cfg, checkpoints), jax.devices())
    if checkpoints.steps():
        check_settings(resolved, checkpoints.meta())
    mesh, data = sharding.make_mesh(dataclasses.asdict(resolved.mesh)), resolved.data
    check_rows(resolved, mesh)
    validates = bool(data.validation_path or data.validation_share)
    retention.check_keep_best(resolved.keep_best, validates=validates, evaluates=resolved.evaluates)
    for policy in (resolved.remat, resolved.vision_remat):
        remat.check(policy)
    profiling.Profiler(Path(), resolved.profile, resolved.slow_step)
    if resolved.wandb:
        metrics.import_wandb(resolved.wandb)
    datasets = [Dataset.open(path) for _, path in train_data.training_mixture(data).sources]
    groups = encode.group_names([*datasets, *train_data.validation_datasets(data)])
    encode.group_weights(data.loss_weights, groups)
    eval_benchmarks(resolved)
    make_train_step(resolved, mesh, 1)  # for the errors of its optimizer, guard and adapters
    return resolved, mesh, datasets, groups


def prepare(checked: Checked, directory: RunDirectory) -> Prepared:
    """Prepare everything that needs no parameter; the first start writes processor files and plan into the run.

    Raises:
      ValueError: when the configuration, the data and earlier starts of this run do not fit together.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(directory.url / CACHE))
    resolved, mesh, datasets, groups = checked
    assets = directory.local / "assets"
    on_process_zero("assets", lambda: make_assets(resolved, directory))
    directory.pull("assets")
    processor = Processor.from_directory(assets, resolved.model)
    plan = make_or_load_plan(checked, processor, directory)
    steps = optim.num_steps(resolved, plan.num_steps(resolved.data.batch_rows))
    step = make_train_step(resolved, mesh, steps, len(groups))
    feed = train_data.Feed(resolved, step, datasets, plan, processor, groups)
    return Prepared(resolved, processor, assets, datasets, plan, steps, step, feed)


def with_checkpoint(cfg: RunConfig, checkpoints: RunCheckpoints) -> RunConfig:
    """Complete the model from the checkpoint that training starts from: the run's own, else ``init_from``.

    Raises:
      ValueError: when the configuration gives neither a checkpoint nor an architecture; as ``cfg.with_checkpoint``.
    """
    if not cfg.init_from:
        if cfg.model.vision is None or cfg.model.decoder is None:
            raise ValueError("init_from is empty: give --config.init_from=CHECKPOINT or model.vision and model.decoder")
        return cfg
    if checkpoints.steps():
        return cfg.with_checkpoint(ModelConfig.from_dict(checkpoints.meta()["model"]), "the run's own checkpoint")
    where = loading.locate(cfg.init_from)
    return cfg.with_checkpoint(loading.config_of(where), str(where))


def make_assets(cfg: ResolvedConfig, directory: RunDirectory) -> None:
    """Write the processor's files into the run, unless it has them: those of ``init_from``, or the project's own."""
    assets = directory.local / "assets"
    if not assets.exists():
        with atomic.new_directory(assets) as partial:
            if cfg.init_from:
                loading.copy_assets(loading.locate(cfg.init_from), partial)
            else:
                Processor.small(cfg.model).save(partial)
    directory.push()


def check_rows(cfg: RunConfig, mesh: jax.sharding.Mesh) -> None:
    """``check_divisible`` of the rows in training and, if there is one, in evaluation."""
    check_divisible("data.batch_rows", cfg.data.batch_rows, mesh, cfg.rules, max(cfg.microbatches, 1))
    if cfg.evaluates:
        check_divisible("eval_batch", cfg.eval_batch, mesh, cfg.rules)


def make_or_load_plan(checked: Checked, processor: Processor, directory: RunDirectory) -> Plan:
    """The run's plan: made or copied from ``data.plan`` at the first start, the same at every other.

    Raises:
      ValueError: when the existing plan is for other settings; names the first that differs.
    """
    cfg, _, datasets, _ = checked
    data, own = cfg.data, directory.local / "plan"
    sources = datasets, train_data.training_mixture(data), processor, data.row_shape(cfg.model)
    settings: dict[str, Any] = {"batch_rows": data.batch_rows, "seed": data.seed, "on_overflow": data.on_overflow}
    if not own.exists() and not data.plan:
        plan = make_plan(*sources, **settings, progress=jax.process_index() == 0)
    else:
        found = own if own.exists() else Path(data.plan)
        plan = Plan.load(found)
        if changed := first_difference(plan_inputs(*sources, **settings), plan.inputs):
            raise ValueError(f"{found} is a plan for other settings: {changed}; restore them, or use another --run")

    def save() -> None:
        if not own.exists():
            plan.save(own)
        directory.push()

    # All processes look for the plan before one of them saves it.
    on_process_zero("plan is made", lambda: None)
    on_process_zero("plan is saved", save)
    return plan


def eval_benchmarks(cfg: RunConfig) -> list[tuple[Benchmark, Sequence[Item], int]]:
    """The benchmarks of a run's evaluations with their items, and how many of them are asked; 0 for all.

    Raises:
      ValueError: for an unknown benchmark, or data of another schema.
      FileNotFoundError: when data are missing.
    """
    found: list[tuple[Benchmark, Sequence[Item], int]] = []
    if cfg.data.eval_path:
        dataset = DatasetBenchmark(cfg.eval_examples)
        found.append((dataset, dataset.items(cfg.data.eval_path), 0))
    names, places = (list(filter(None, text.split(","))) for text in (cfg.eval_benchmarks, cfg.eval_benchmark_data))
    found += [(b, b.items(path), cfg.eval_benchmark_examples) for b, path in choose(names, places)]
    return found


def make_evaluator(prepared: Prepared) -> Evaluator | None:
    cfg = prepared.cfg
    if not cfg.evaluates:
        return None
    sampling = Sampling(max_new_tokens=cfg.max_new_tokens)
    settings: dict[str, Any] = {"sampling": sampling, "slots": cfg.eval_batch, "shown": cfg.samples}
    return Evaluator(eval_benchmarks(cfg), prepared.processor, **settings)


def make_validator(prepared: Prepared) -> Validator | None:
    cfg, step, processor = prepared.cfg, prepared.step, prepared.processor
    found = train_data.validation_plan(cfg.data, processor, prepared.datasets)
    if found is None:
        return None
    feed = train_data.Feed(cfg, step, *found, processor, prepared.feed.groups)
    return Validator(step, feed, min(cfg.validate_batches, found[1].num_steps(cfg.data.batch_rows)))


def start(prepared: Prepared, checkpoints: RunCheckpoints, log: Log, at_most: int | None = None) -> tuple[State, Any]:
    """The state to begin with and the vision tail: this run's newest checkpoint, else ``init_from``, else random.

    Args:
      at_most: the newest step to restore; see ``RunCheckpoints.restore``.
    """
    cfg, step = prepared.cfg, prepared.step
    if checkpoints.steps(at_most):
        check = functools.partial(check_unchanged, prepared, log=log)
        state, tail, meta = checkpoints.restore(step.abstract_state, prepared.vision_tail, at_most=at_most, check=check)
        log(f"continuing from step {meta['step']}")
        return state, tail
    if cfg.init_from:
        target = lora.without(step.abstract_state["params"]) | {"vision_tail": prepared.vision_tail}
        params = loading.read_params(loading.locate(cfg.init_from), cfg.model, target)
        tail = params.pop("vision_tail", {})  # early fusion has none
        return step.init(init_params(cfg, step, params)), tail
    make_tail = jax.jit(prepared.make_vision_tail, out_shardings=sharding.replicated(step.mesh))
    return step.init(init_params(cfg, step)), make_tail()


def check_settings(cfg: ResolvedConfig, meta: Mapping[str, Any]) -> None:
    """Check that all settings that determine a run's numbers are as they were.

    Args:
      meta: of the checkpoint that training continues from.

    Raises:
      ValueError: naming the first field that differs.
    """

    def determining(cfg: Mapping[str, Any]) -> dict[str, Any]:
        values = {name: cfg.get(name) for name in ("model", "optim", "lora", "dtype", "seed")}
        return values | {"data": {"loss_weights": cfg.get("data", {}).get("loss_weights")}}

    now = json.loads(json.dumps(dataclasses.asdict(cfg)))
    if changed := first_difference(determining(now), determining(meta["run"])):
        raise ValueError(f"{changed}: this run was started otherwise; keep it as it was, or use a new --run")


def check_unchanged(prepared: Prepared, meta: Mapping[str, Any], log: Log) -> None:
    """``check_settings`` and the same for the plan; log a changed guard or code version.

    Raises:
      ValueError: naming the first field that differs.
    """
    check_settings(prepared.cfg, meta)
    if meta["plan"] != prepared.plan.hash:
        plans = f"was trained with plan {meta['plan'][:12]}, and its plan/ is now {prepared.plan.hash[:12]}"
        raise ValueError(f"checkpoint {meta['step']} of this run {plans}: restore the former, or use a new --run")
    for name, here in (("guard", dataclasses.asdict(prepared.cfg.guard)), ("code", layout.code_version())):
        if name in (before := {**meta["run"], **meta}) and (then := before[name]) != here:
            log(f"{name} is {here}, and was {then} when checkpoint {meta['step']} was written")
