"""Train Phi-4-reasoning-vision: configuration → mesh → data → state → loop.

    python train.py --config=configs/tiny.py --run=runs/tiny
    python train.py --config=configs/tiny.py --run=runs/tiny --config.optim.learning_rate=1e-3

A run's directory holds its configuration, plan, metrics (JSONL and TensorBoard) and checkpoints. Started again with the
same directory, training goes on from the newest checkpoint, to the same numbers that it would have reached undisturbed.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags
from flax import nnx
from ml_collections import config_flags

from phivision_jax import loading, sharding
from phivision_jax.batch import batch_spec
from phivision_jax.data import quarantine
from phivision_jax.data.dataset import Dataset
from phivision_jax.data.encode import GROUP_NAMES
from phivision_jax.data.mixture import Mixture
from phivision_jax.data.pipeline import batches, rows_of_process, to_device
from phivision_jax.data.plan import Plan, differing, make_plan, plan_inputs
from phivision_jax.evaluation.runner import Evaluator
from phivision_jax.models import phivision
from phivision_jax.models.vision_tail import VisionTail
from phivision_jax.processor import Processor
from phivision_jax.progress import training_bar
from phivision_jax.training import layouts
from phivision_jax.training.checkpoints import RunCheckpoints
from phivision_jax.training.config import RunConfig
from phivision_jax.training.metrics import MetricsWriter, batch_metrics, group_metrics
from phivision_jax.training.step import State, TrainStep, init_params, make_train_step

config_flags.DEFINE_config_file("config", None, "Configuration file, e.g. configs/tiny.py or configs/tiny.py:long.")
flags.DEFINE_string("run", None, "Directory of the run: made if new, continued if it holds checkpoints.")


def train(cfg: RunConfig, run: Path) -> dict[str, float]:
    """Run one training to its end and return the last metrics.

    Raises:
      ValueError: when something in the configuration, the data or an earlier start of this run does not fit; nothing
        has been trained then.
    """
    run.mkdir(parents=True, exist_ok=True)

    # Mesh, data.
    cfg = layouts.resolve(cfg, jax.devices())
    mesh = sharding.make_mesh(dataclasses.asdict(cfg.mesh))
    processor, assets = make_processor(cfg, run)
    mixture = Mixture.read(cfg.data.path, epochs=cfg.data.epochs)
    if cfg.data.stage:
        mixture = mixture.only(cfg.data.stage)
    datasets = [Dataset.open(path) for _, path in mixture.sources]
    plan = make_or_load_plan(cfg, mixture, datasets, processor, run)
    available = plan.num_steps(cfg.data.batch_rows)
    steps = cfg.optim.steps or available
    if steps > available:
        raise ValueError(
            f"optim.steps is {steps}, but data.epochs={cfg.data.epochs} gives {available}; raise data.epochs"
        )
    check_rows(cfg, mesh)
    evaluator = make_evaluator(cfg, processor, mesh)

    # Shapes, then the compiled step, then arrays.
    step = make_train_step(cfg, mesh, steps, len(GROUP_NAMES))
    spec = batch_spec(
        rows=cfg.data.batch_rows,
        length=cfg.data.length,
        vision_rows=cfg.data.vision_rows,
        num_patches=cfg.data.num_patches,
        patch_dim=cfg.model.vision.patch_dim,
    )
    compiling = time.monotonic()
    compiled = step.compile(spec)
    say(f"{describe(step, plan, mesh)}; compiled in {time.monotonic() - compiling:.1f} s")
    checkpoints = RunCheckpoints(run, cfg.keep_checkpoints, cfg.keep_every, cfg.keep_best, say)
    state, vision_tail = start(cfg, step, checkpoints, plan)
    first = int(state["step"])

    # The loop.
    meta = {"model": dataclasses.asdict(cfg.model), "plan": plan.hash, "run": dataclasses.asdict(cfg)}
    writer = MetricsWriter(run, first)
    began = time.monotonic() - writer.elapsed
    bad = quarantine.RunLog(run / quarantine.file_of_process(jax.process_index()), cfg.data.max_bad)
    batch_at = sharding.batch_shardings(mesh, spec)
    rows_here = rows_of_process(batch_at.tokens, cfg.data.batch_rows)
    rows = batches(
        datasets,
        plan,
        processor,
        batch_rows=cfg.data.batch_rows,
        rows_here=rows_here,
        start_step=first,
        num_threads=cfg.data.num_threads,
    )
    last: dict[str, float] = {}
    since, seen = time.monotonic(), 0
    with training_bar(steps, first) as bar:
        for batch, info in rows:
            if info.step >= steps:
                break
            bad.add(info.holes, sum(map(len, info.record_ids)))
            state, metrics = compiled(state, to_device(batch, batch_at, cfg.data.batch_rows))
            done, seen = info.step + 1, seen + int((batch.segment_ids > 0).sum())
            if done % cfg.log_every == 0 or done == steps:
                last = log_row(metrics, step, done) | batch_metrics(batch)
                now = time.monotonic()
                last |= {
                    "tokens_per_s": seen * jax.process_count() / (now - since),
                    "elapsed_s": now - began,
                    "holes": bad.holes,
                }
                writer.write(done, last)
                checkpoints.check()
                bar.update(done, loss=last["loss"], tokens_per_s=last["tokens_per_s"])
                since, seen = time.monotonic(), 0
            if evaluator and ((cfg.eval_every and done % cfg.eval_every == 0) or done == steps):
                accuracy = evaluate(evaluator, step, state) | {"elapsed_s": time.monotonic() - began}
                last |= accuracy
                writer.write(done, accuracy)
                bar.update(done, accuracy=accuracy["eval/accuracy"])
                since, seen = time.monotonic(), 0
            # Last: whatever a resumed run skips has been evaluated and written.
            if done % cfg.checkpoint_every == 0 or done == steps:
                checkpoints.save(state, vision_tail, meta, assets, last)
    checkpoints.close()
    writer.close()
    return last


def make_processor(cfg: RunConfig, run: Path) -> tuple[Processor, Path]:
    """The run's processor, and its files: at the first start those of ``init_from``, or the project's small ones."""
    assets = run / "assets"
    if not assets.exists():
        partial = run / ".assets.partial"
        shutil.rmtree(partial, ignore_errors=True)
        if cfg.init_from:
            loading.copy_assets(loading.locate(cfg.init_from), partial)
        else:
            Processor.small(cfg.model).save(partial)
        partial.rename(assets)
    return Processor.from_directory(assets, cfg.model), assets


def check_rows(cfg: RunConfig, mesh: jax.sharding.Mesh) -> None:
    """Rows are split over the slice, data and fsdp axes, in training and in evaluation."""
    parts = sharding.parts(mesh, sharding.RULES["batch"])
    for name, rows in (("data.batch_rows", cfg.data.batch_rows), ("eval_batch", cfg.eval_batch)):
        if rows % parts:
            raise ValueError(
                f"{name} is {rows}, which does not divide over {parts} devices (mesh axes slice, data and fsdp); "
                f"take a multiple of {parts}, or set mesh.fsdp"
            )


def make_or_load_plan(
    cfg: RunConfig, mixture: Mixture, datasets: list[Dataset], processor: Processor, run: Path
) -> Plan:
    """The run's plan: made at the first start, or taken from ``data.plan``; the same at every other start."""
    data = cfg.data
    settings: dict[str, Any] = {
        "length": data.length,
        "vision_rows": data.vision_rows,
        "num_patches": data.num_patches,
        "batch_rows": data.batch_rows,
        "seed": data.seed,
        "on_overflow": data.on_overflow,
    }
    where = run / "plan"
    if not where.exists() and not data.plan:
        plan = make_plan(datasets, mixture, processor, **settings, progress=jax.process_index() == 0)
    else:
        found = where if where.exists() else Path(data.plan)
        plan, now = Plan.load(found), plan_inputs(datasets, mixture, processor, **settings)
        if changed := differing(now, plan.inputs):
            raise ValueError(
                f"{found} is another plan than this configuration's: {changed}; keep data, tokenizer, patch settings, "
                "row sizes and seed as they were, or take a new --run directory"
            )
    if not where.exists() and jax.process_index() == 0:
        plan.save(where)
    return plan


def make_evaluator(cfg: RunConfig, processor: Processor, mesh: jax.sharding.Mesh) -> Evaluator | None:
    if not cfg.data.eval_path:
        return None
    return Evaluator(
        Dataset.open(cfg.data.eval_path),
        processor,
        rows=cfg.eval_batch,
        max_new_tokens=cfg.max_new_tokens,
        num_examples=cfg.eval_examples or None,
        mesh=mesh,
    )


def start(cfg: RunConfig, step: TrainStep, checkpoints: RunCheckpoints, plan: Plan) -> tuple[State, Any]:
    """The state to begin with: this run's newest checkpoint, else ``init_from``, else random; and the vision tail."""
    tail = jax.eval_shape(lambda: VisionTail(cfg.model.vision, rngs=nnx.Rngs(cfg.seed)))
    tail_target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding.replicated(step.mesh)),
        nnx.to_pure_dict(nnx.state(tail, nnx.Param)),
    )
    if checkpoints.latest is not None:
        check_unchanged(cfg, checkpoints.meta()["run"])
        state, tail, meta = checkpoints.restore(step.abstract_state, tail_target)
        say(f"continuing from step {meta['step']}")
        return state, tail
    if cfg.init_from:
        where = loading.locate(cfg.init_from)
        if (found := loading.config_of(where)) != dataclasses.replace(cfg.model, image_attention=found.image_attention):
            raise ValueError(f"{where} holds another model than the configuration's: {found} against {cfg.model}")
        target = step.abstract_state["params"] | {"vision_tail": tail_target}
        params = loading.read_params(where, cfg.model, target)
        tail = params.pop("vision_tail")
        return step.init(params), tail
    make_tail = jax.jit(
        lambda: nnx.to_pure_dict(nnx.state(VisionTail(cfg.model.vision, rngs=nnx.Rngs(cfg.seed)), nnx.Param)),
        out_shardings=sharding.replicated(step.mesh),
    )
    return step.init(init_params(cfg, step)), make_tail()


def check_unchanged(cfg: RunConfig, before: dict[str, Any]) -> None:
    """A run goes on only with what decides its numbers as it was.

    Raises:
      ValueError: naming the first field that differs.
    """
    now = json.loads(json.dumps(dataclasses.asdict(cfg)))
    for name in ("model", "optim", "dtype", "seed"):
        if now[name] != before[name]:
            raise ValueError(
                f"this run was started with {name} = {before[name]}, now it is {now[name]}; take a new --run"
            )


def log_row(metrics: dict[str, jax.Array], step: TrainStep, done: int) -> dict[str, float]:
    """One line of metrics, fetched from the device."""
    host: dict[str, Any] = jax.device_get(metrics)
    if not np.isfinite(host["loss"]):
        raise FloatingPointError(f"the loss of step {done} is {host['loss']}: training stops here")
    groups = group_metrics(host.pop("group_loss"), host.pop("group_weight"), GROUP_NAMES)
    accuracy = float(host.pop("correct")) / max(float(host["weight"]), 1.0)
    scalars = {name: float(value) for name, value in host.items()}
    return scalars | {"token_accuracy": accuracy, "learning_rate": float(step.learning_rate(done - 1))} | groups


def evaluate(evaluator: Evaluator, step: TrainStep, state: State) -> dict[str, float]:
    with jax.set_mesh(step.mesh):
        result = evaluator(phivision.merge(step.graphdef, state["params"]))
    return {"eval/accuracy": result.accuracy, "eval/examples": len(result.answers)}


def describe(step: TrainStep, plan: Plan, mesh: jax.sharding.Mesh) -> str:
    count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(step.abstract_state["params"]))
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    return f"{count:,} parameters on {axes}; plan {plan.hash[:12]}: {plan.summary()}"


def say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells every file it writes
    config = flags.FLAGS.config
    try:
        if config is None or flags.FLAGS.run is None:
            raise ValueError(
                "both --config and --run are needed: python train.py --config=configs/tiny.py --run=runs/tiny"
            )
        cfg = RunConfig.from_dict(config.to_dict())
        last = train(cfg, Path(flags.FLAGS.run))
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        sys.exit(f"train.py: {error}")
    say(", ".join(f"{name} {value:.4g}" for name, value in last.items() if name in ("loss", "eval/accuracy")))


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parser; ml_collections raises at a field that does not exist, and names the nearest one."""
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError) as error:
        sys.exit(f"train.py: {error}")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
