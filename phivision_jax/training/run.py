"""Train a model: one start of a run, from its directory to its last checkpoint.

configuration → checks → run directory → plan, compiled step → state → loop → checkpoints and metrics
"""

import contextlib
import dataclasses
import json
import math
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import jax

from phivision_jax.batch import Batch
from phivision_jax.checkpoint import layout
from phivision_jax.checkpoint.manager import CheckpointError, RunCheckpoints
from phivision_jax.data import quarantine
from phivision_jax.data.feed.pipeline import BatchInfo
from phivision_jax.distributed.heartbeat import LONG_S, PREEMPTED, Watchdog
from phivision_jax.distributed.processes import Preemption, on_process_zero
from phivision_jax.evaluation.answer_images import answer_images
from phivision_jax.evaluation.periodic import Evaluator
from phivision_jax.io import atomic, jsonl, progress
from phivision_jax.models import phivision
from phivision_jax.training import guard, optim, setup
from phivision_jax.training.run_config import RunConfig
from phivision_jax.training.run_directory import RunDirectory
from phivision_jax.training.step import Compiled, State
from phivision_jax.training.telemetry import goodput, profiling, throughput
from phivision_jax.training.telemetry.metrics import MetricsWriter, group_metrics
from phivision_jax.training.validation import Validator


def train(cfg: RunConfig, where: str) -> int:
    """Train to the end, or until the process is asked to stop.

    Args:
      where: the run's directory, or ``gs://bucket/folder``; created if new, continued if it holds checkpoints.

    Returns:
      Exit code: 0 at the end, ``PREEMPTED`` when asked to stop, with everything saved.

    Raises:
      ValueError: when another process trains this run; when the configuration, the data and earlier starts of this run
        do not fit together, before any training; when a checkpoint cannot be written.
      StorageError: when the bucket cannot be read at the start, or written at the end.
      FloatingPointError: after too many skipped updates in a row.
    """
    checked = setup.check(cfg, where)
    with Run(where, cfg) as run:
        if jax.process_index() == 0:
            record_start(run.directory.local, cfg)
            run.directory.push()  # before assets and plan, which a later start takes for a run's only beside these
        # Shapes, then the compiled step, then arrays.
        prepared = setup.prepare(checked, run.directory)
        log(prepared.describe())
        with run.phase("compile", LONG_S):
            log("compiling the step …")
            measures = setup.make_evaluator(prepared), setup.make_validator(prepared)
            compiled = prepared.step.compile(prepared.feed.spec)
        log(f"compiled in {run.goodput.seconds['compile']:.1f} s")
        with run.phase("restore", LONG_S):
            state, vision_tail = setup.start(prepared, run.checkpoints, log)
        first, steps = int(state["step"]), prepared.steps
        run.begin(prepared, first, measures)
        row: dict[str, float] = {}
        with Preemption(first) as preemption, run.finish_save_on_error():
            if first and not run.measured_at_start:  # asked to stop at this step, the last start only saved
                row = run.measure(state, first)
                run.write(first, row)
            for batch, info in run.batches():
                state, metrics = run.step(compiled, state, batch, info)
                step = info.step + 1
                stop, last = preemption.reached(step), step == steps
                save = is_due(step, cfg.checkpoint_every) or stop or last
                row = run.step_row(step, metrics) if is_due(step, cfg.log_every) or last else {}
                run.due = (step, state, vision_tail, row) if save else None
                if not stop or last:
                    row |= run.measure(state, step)
                run.write(step, row)
                # Last: whatever a restart skips has been measured and written.
                if save:
                    run.save(state, vision_tail, row)
                if stop:
                    break
            run.close()
        step = int(state["step"])
    if step < steps:
        log(f"asked to stop: step {step} of {steps} is saved; the same command continues from there")
    else:
        shown = ("loss", "validation/loss", "eval/accuracy")
        log(", ".join(f"{name} {row[name]:.4g}" for name in shown if name in row))
    if jax.process_index() == 0:
        log(goodput.report(run.directory.url))
    return PREEMPTED if step < steps else 0


class Run:
    """One start of a run on one process: its directory, watchdog, goodput account, logs, guard and profiler.

        with Run(where, cfg) as run:
            with run.phase("compile", LONG_S): …
            run.begin(prepared, first, measures)
            for batch, info in run.batches():
                state, metrics = run.step(compiled, state, batch, info)
                …
            run.close()

    Args:
      where: the run's directory, or ``gs://bucket/folder``.
    """

    def __init__(self, where: str, cfg: RunConfig) -> None:
        self.cfg = cfg
        self.directory = RunDirectory(where, jax.process_index(), jax.process_count(), log)
        self.due: tuple[int, State, Any, dict[str, float]] | None = None
        """A step that is to be saved once it is evaluated, with its state, vision tail and metrics."""

    def __enter__(self) -> Self:
        cfg, folder, process = self.cfg, self.directory.local, jax.process_index()
        with contextlib.ExitStack() as stack:
            on_process_zero("the run is locked", lambda: stack.enter_context(self.directory.lock))
            stack.enter_context(self.directory)
            self._watchdog = stack.enter_context(contextlib.closing(Watchdog(folder, cfg.step_timeout_s, process)))
            self.goodput = stack.enter_context(goodput.Goodput(None if process else folder))
            keep = (cfg.keep_checkpoints, cfg.keep_every, cfg.keep_best)
            self.checkpoints = RunCheckpoints(self.directory.url, *keep, log, before_save=self.directory.push)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._stack.__exit__(*error)

    @contextlib.contextmanager
    def phase(self, name: str, limit_s: float | None = None) -> Iterator[None]:
        """A phase of the process, named as in ``goodput.py``, for its heartbeats, its watchdog and its account.

        Args:
          limit_s: seconds after which it counts as hung; default ``step_timeout_s``.
        """
        outer = self._watchdog.phase
        self._watchdog.alive(name, limit_s)
        with self.goodput(name):
            yield
        self._watchdog.alive(*outer)

    def begin(self, prepared: setup.Prepared, first: int, measures: tuple[Evaluator | None, Validator | None]) -> None:
        """Open the logs. Training resumes from step ``first``; what earlier starts logged beyond it is dropped."""
        self.prepared, self.first, self.cfg = prepared, first, prepared.cfg
        self._evaluator, self._validator = measures
        cfg, process, folder = self.cfg, jax.process_index(), self.directory.local
        if process == 0 or self.directory.mirrored:
            truncate_logs(folder, first)
        on_process_zero("logs are truncated", lambda: None)
        values = dataclasses.asdict(cfg)
        plan, code = prepared.plan.hash, layout.code_version()
        self._meta: dict[str, Any] = {"model": values["model"], "plan": plan, "run": values, "code": code}
        self._metrics = MetricsWriter(folder, first, wandb=cfg.wandb, config=values)
        self._began = time.monotonic() - self._metrics.elapsed
        self._records = folder / f"records_{process}.jsonl"
        self._failed = quarantine.RunLog(folder / quarantine.file_of_process(process), cfg.data.max_bad)
        self._skipped = guard.SkippedUpdates(folder, cfg.guard.patience, log, late=goodput.AHEAD)
        self._profiler = profiling.Profiler(folder, cfg.profile, cfg.slow_step, log)
        self._throughput = throughput.Throughput(cfg, list(prepared.step.mesh.devices.flat))
        self._lr_multipliers = optim.multipliers(prepared.step.abstract_state["params"], cfg.optim)
        self._show = self._stack.enter_context(progress.training_bar(prepared.steps, first, shown=process == 0))
        self.goodput.begin(first)

    @property
    def measured_at_start(self) -> bool:
        """True if the step that training resumes from has its validation and evaluation in the metrics."""
        return any(name.startswith(("validation/", "eval/")) for name in self._metrics.logged)

    def batches(self) -> Iterator[tuple[Batch, BatchInfo]]:
        """This host's batches of the remaining steps."""
        batches = self.prepared.feed.batches(self.first, self.prepared.steps)
        while True:
            with self.phase("data"):
                item = next(batches, None)
            if item is None:
                return
            yield item

    def step(self, compiled: Compiled, state: State, batch: Batch, info: BatchInfo) -> tuple[State, dict[str, Any]]:
        """Log a step's records and dispatch it.

        Raises:
          FloatingPointError: after too many skipped updates in a row.
        """
        step = info.step + 1
        jsonl.append(self._records, {"step": step, "ids": info.record_ids})
        self._failed.add(info.failed, sum(map(len, info.record_ids)))
        self._profiler.before(step, self.goodput.drain, self.goodput.durations())
        self._watchdog.alive("step", step=step)
        with self.phase("host"):
            placed = self.prepared.feed.place(batch)
        state, metrics = self.goodput.run(compiled, state, placed)
        self._throughput.add(metrics.pop("work"))
        self._skipped.add(step, metrics, info.record_ids)
        return state, metrics

    def step_row(self, step: int, metrics: dict[str, jax.Array]) -> dict[str, float]:
        """The metrics of a step and of the interval before it; waits for the devices."""
        timing = self.goodput.row()
        row = timing | self._throughput.row(timing["time/step_s"]) | loss_metrics(metrics, self.prepared.feed.groups)
        row |= optim.learning_rates(float(self.prepared.step.learning_rate(step - 1)), self._lr_multipliers)
        self.goodput.write(step)
        return row | {"failed_examples": self._failed.failed}

    def write(self, step: int, row: dict[str, float]) -> None:
        """Write a line of metrics, unless it is empty.

        Raises:
          CheckpointError: when the checkpoint in flight has failed.
        """
        if row:
            row = {"elapsed_s": time.monotonic() - self._began} | row
            self._metrics.write(step, row)
            self._show(step, **row)
            self.checkpoints.check()

    def measure(self, state: State, step: int) -> dict[str, float]:
        """Validation loss, and accuracy of generated answers, whichever is due after this step; both after the last."""
        cfg, last = self.cfg, step == self.prepared.steps
        row: dict[str, float] = {}
        if self._validator and (is_due(step, cfg.validate_every) or last):
            with self.phase("evaluate", LONG_S):
                row |= self._validator(state["params"])
        if self._evaluator and (is_due(step, cfg.eval_every) or last):
            with self.phase("evaluate", LONG_S), self.prepared.step.in_force():
                results = self._evaluator(phivision.merge(self.prepared.step.graphdef, state["params"]))
            self._metrics.write_images(step, "samples", answer_images(self._evaluator.examples))
            row |= self._evaluator.metrics(results)
        return row

    def save(self, state: State, vision_tail: Any, row: dict[str, float]) -> None:
        """Save a checkpoint, which is written while training continues.

        Args:
          row: the step's metrics, for ``keep_best``.

        Raises:
          FloatingPointError: after too many skipped updates in a row.
          CheckpointError: when it, or the one before, cannot be written.
          LostError: when another start has taken the run over.
        """
        self.due = None
        self._skipped.drain()
        with self.phase("checkpoint", LONG_S):
            self.directory.lock.check()
            self.goodput.drain()
            self.checkpoints.save(state, vision_tail, self._meta, self.prepared.assets, row)

    def close(self) -> None:
        """Wait for the last checkpoint and close the logs. Errors as ``save``."""
        self._skipped.drain()
        self._profiler.close(self.goodput.drain)
        with self.phase("checkpoint", LONG_S):
            self.checkpoints.close()  # still inside Preemption: this may take minutes
        self._metrics.close()

    @contextlib.contextmanager
    def finish_save_on_error(self) -> Iterator[None]:
        """On an exception, wait for the checkpoint in flight to commit: it may be the only one to go back to. If an
        evaluation raised it, save the step that is due first.

        With several processes only for an exception that all of them raise: others would not write their part. An
        evaluation is the same on all of them, but a file may be missing on one.
        """
        try:
            yield
        except Exception as error:
            due = None if isinstance(error, CheckpointError) else self.due
            everywhere = isinstance(error, FloatingPointError) or (due and not isinstance(error, OSError))
            if jax.process_count() == 1 or everywhere:
                with contextlib.suppress(CheckpointError), self.phase("checkpoint", LONG_S):
                    if due:
                        step, state, vision_tail, row = due
                        self.write(step, row)
                        self.save(state, vision_tail, row)
                    self.checkpoints.wait()
            raise


def loss_metrics(metrics: dict[str, jax.Array], groups: Sequence[str]) -> dict[str, float]:
    """A step's metrics, fetched from the devices, without those that are not finite (``skipped.jsonl`` has them).

    A step without a target token has no loss.
    """
    host: dict[str, Any] = jax.device_get(metrics)
    by_group = group_metrics("loss", groups, host.pop("group_loss"), host.pop("group_weight"))
    host["token_accuracy"] = host.pop("correct") / (host["weight"] or math.nan)
    host["loss"] = host["loss"] if host["weight"] else math.nan
    row = {name: float(value) for name, value in host.items()} | by_group
    return {name: value for name, value in row.items() if math.isfinite(value)}


def record_start(run: Path, cfg: RunConfig) -> None:
    """Write the configuration of this start, with automatic values open, and the command that began it."""
    atomic.write(run / layout.CONFIG, json.dumps(dataclasses.asdict(cfg), indent=2) + "\n")
    atomic.write(run / layout.COMMAND, shlex.join(sys.argv) + "\n")


def is_due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0


def truncate_logs(run: Path, step: int) -> None:
    """Drop lines of later steps from the logs of all processes: a start with fewer processes continues them all."""
    for path in (*run.glob("records_*.jsonl"), *run.glob("skipped*.jsonl")):
        jsonl.truncate(path, step)


def log(text: str) -> None:
    """Print on the first process."""
    if jax.process_index() == 0:
        print(text, flush=True)
