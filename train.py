"""Train Phi-4-reasoning-vision: configuration → mesh → data → state → loop.

    python train.py --config=configs/tiny.py --run=runs/tiny
    python train.py --config=configs/finetune.py --help                    # every field of a configuration
    python train.py --config=configs/tiny.py --run=runs/tiny --replay=120  # step 120 once more; the run stays as it is

A run's directory, which may be gs://bucket/folder, holds its plan, metrics (JSONL and TensorBoard), checkpoints and
where its time went. Started again with the same directory, training goes on from the newest checkpoint, to the same
numbers that it would have reached undisturbed. Ends with 0 when training is over, 75 when it was told to stop and has
saved: start it again (docs/launch.md has all codes).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
from absl import app, flags
from ml_collections import config_flags

from phivision_jax.batch import Batch
from phivision_jax.checkpoint import layout
from phivision_jax.checkpoint.manager import CheckpointError, RunCheckpoints
from phivision_jax.cli import config_help as help_page
from phivision_jax.data import quarantine
from phivision_jax.data.feed.encode import GROUP_NAMES
from phivision_jax.data.feed.pipeline import BatchInfo
from phivision_jax.distributed import processes
from phivision_jax.distributed.heartbeat import PREEMPTED
from phivision_jax.distributed.watchdog import Watchdog
from phivision_jax.evaluation.answer_images import answer_images
from phivision_jax.evaluation.runner import Evaluator
from phivision_jax.io.progress import training_bar
from phivision_jax.models import phivision
from phivision_jax.training import optim, setup
from phivision_jax.training.guard import SkippedSteps
from phivision_jax.training.replay import replay
from phivision_jax.training.run_config import RunConfig
from phivision_jax.training.run_directory import RunDirectory
from phivision_jax.training.telemetry import goodput_report, record_log
from phivision_jax.training.telemetry.goodput import AHEAD, Goodput
from phivision_jax.training.telemetry.metrics import MetricsWriter, group_metrics
from phivision_jax.training.telemetry.module_norms import learning_rates
from phivision_jax.training.telemetry.profiling import Profiler
from phivision_jax.training.telemetry.throughput import Speed

config_flags.DEFINE_config_file("config", None, "Configuration file, e.g. configs/tiny.py or configs/tiny.py:long.")
flags.DEFINE_string("run", None, "Directory of the run, or gs://…: made if new, continued if it holds checkpoints.")
flags.DEFINE_integer("replay", None, "Take this step of the run again and say all about it; the run stays as it is.", 1)

EXPECTED = (ValueError, OSError, FloatingPointError, ModuleNotFoundError)
"""Exceptions whose text is a sentence for the user."""


def train(cfg: RunConfig, where: str) -> int:
    """Run one training to its end, or until it is told to stop.

    Args:
      where: the run's directory, or its place in a bucket.

    Returns:
      0 at the end, ``PREEMPTED`` when it was told to stop and has saved.

    Raises:
      ValueError: when something in the configuration, the data or an earlier start of this run does not fit; nothing
        has been trained then. When a checkpoint could not be written.
      StorageError: when the bucket cannot be read at the start, or written at the end.
      FloatingPointError: when too many steps in a row were not taken.
    """
    leads = jax.process_index() == 0
    with (
        RunDirectory(where, jax.process_index(), jax.process_count(), say) as directory,
        contextlib.closing(Watchdog(directory.local, cfg.step_timeout_s)) as watchdog,
        Goodput(directory.local if leads else None) as goodput,
    ):
        # Shapes, then the compiled step, then arrays.
        keep = (cfg.keep_checkpoints, cfg.keep_every, cfg.keep_best)
        checkpoints = RunCheckpoints(directory.url, *keep, say, before_save=directory.push)
        made = setup.prepare(cfg, directory, checkpoints)
        cfg, step, steps = made.cfg, made.step, made.steps
        evaluator, validator = setup.make_evaluator(made), setup.make_validator(made)
        watchdog.alive("compiling", limit_s=Watchdog.STARTING_S)
        compiling = time.monotonic()
        with goodput("compile"):
            compiled = step.compile(made.spec)
        say(f"{made.describe()}; compiled in {time.monotonic() - compiling:.1f} s")
        watchdog.alive("restoring", limit_s=Watchdog.STARTING_S)
        with goodput("restore"):
            state, vision_tail = setup.start(made, checkpoints, say)
        first = int(state["step"])
        meta: dict[str, Any] = {
            "model": dataclasses.asdict(cfg.model),
            "plan": made.plan.hash,
            "run": dataclasses.asdict(cfg),
            "code": layout.code_version(),
        }

        # What is written of it.
        run = directory.local
        if leads or directory.mirrored:
            record_log.cut_all(run, first)
        processes.on_process_zero("logs are cut", lambda: None)
        writer = MetricsWriter(run, first, wandb=cfg.wandb, config=meta["run"])
        records = record_log.RecordLog(run, jax.process_index(), first)
        bad = quarantine.RunLog(run / quarantine.file_of_process(jax.process_index()), cfg.data.max_bad)
        skipped = SkippedSteps(run, cfg.guard.patience, say, late=AHEAD)
        profiler = Profiler(run, cfg.profile, cfg.slow_step, say)
        speed = Speed(cfg, list(step.mesh.devices.flat))
        rates = optim.multipliers(step.abstract_state["params"], cfg.optim)
        goodput.begin(first)
        began = time.monotonic() - writer.elapsed
        row: dict[str, float] = {}

        def measure(done: int) -> dict[str, float]:
            """What is due of loss and accuracy on data that is not trained on."""
            found: dict[str, float] = {}
            if validator and (due(done, cfg.validate_every) or done == steps):
                watchdog.alive("validating", limit_s=Watchdog.STARTING_S)
                with goodput("evaluate"):
                    found |= validator(state["params"])
            if evaluator and (due(done, cfg.eval_every) or done == steps):
                watchdog.alive("evaluating", limit_s=Watchdog.STARTING_S)
                with goodput("evaluate"):
                    found |= evaluate(evaluator, made, state, writer, done)
            return found

        # The loop.
        with (
            processes.Preemption(first) as preemption,
            training_bar(steps, first, shown=leads) as bar,
            finish_save_on_error(checkpoints, watchdog),
        ):
            # A start that was told to stop has saved at once, and left this to us.
            missed = first and not any(name.startswith(("validation/", "eval/")) for name in writer.measured)
            if missed and (row := measure(first)):
                writer.write(first, {"elapsed_s": time.monotonic() - began} | row)
            for batch, info in fed(made, first, goodput, watchdog):
                done = info.step + 1
                records.write(done, info.record_ids)
                bad.add(info.failed, sum(map(len, info.record_ids)))
                profiler.before(done, goodput.drain, goodput.durations())
                watchdog.alive("step", done)
                with goodput("host"):
                    placed = made.place(batch)
                state, metrics = goodput.run(compiled, state, placed)
                speed.take(metrics)
                skipped.take(done, metrics, info.record_ids)
                stop = preemption.reached(done)
                last = done == steps

                row = {}
                if due(done, cfg.log_every) or last:
                    timing = goodput.row()
                    row = timing | speed.row(timing["time/step_s"]) | log_row(metrics)
                    row |= learning_rates(float(step.learning_rate(done - 1)), rates)
                    row |= {"elapsed_s": time.monotonic() - began, "failed_examples": bad.failed}
                    goodput.write(done)
                if not stop or last:
                    row |= measure(done)
                if row:
                    row = {"elapsed_s": time.monotonic() - began} | row
                    writer.write(done, row)
                    bar.update(done, **row)
                    checkpoints.check()
                # Last: whatever a resumed run skips has been evaluated and written.
                if due(done, cfg.checkpoint_every) or stop or last:
                    skipped.drain()
                    watchdog.alive("saving", limit_s=Watchdog.STARTING_S)
                    with goodput("checkpoint"):
                        goodput.drain()
                        checkpoints.save(state, vision_tail, meta, made.assets, row)
                if stop and not last:
                    break
            skipped.drain()
            profiler.close(goodput.drain)
            watchdog.alive("saving", limit_s=Watchdog.STARTING_S)
            with goodput("checkpoint"):
                checkpoints.close()  # still told to stop rather than ended: this may take minutes
        records.close()
        writer.close()
    if stopped := int(state["step"]) < steps:
        say(f"told to stop: step {int(state['step'])} of {steps} is saved; the same command goes on from there")
    else:
        say(
            ", ".join(f"{name} {row[name]:.4g}" for name in ("loss", "validation/loss", "eval/accuracy") if name in row)
        )
    if leads:
        say(goodput_report.report(directory.url))
    return PREEMPTED if stopped else 0


@contextlib.contextmanager
def finish_save_on_error(checkpoints: RunCheckpoints, watchdog: Watchdog) -> Iterator[None]:
    """An error in here waits for the checkpoint that is being written, which may be the only one to go back to.

    Where others write their parts of it, only for an error that all of them have.
    """
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1 or isinstance(error, FloatingPointError):
            watchdog.alive("saving", limit_s=Watchdog.STARTING_S)
            with contextlib.suppress(CheckpointError):
                checkpoints.wait()
        raise


def fed(made: setup.Prepared, first: int, goodput: Goodput, watchdog: Watchdog) -> Iterator[tuple[Batch, BatchInfo]]:
    """The batches from the step after ``first`` on, the time that they are waited for counted."""
    batches = made.batches(first)
    while True:
        watchdog.alive("data")
        with goodput("data"):
            item = next(batches, None)
        if item is None:
            return
        yield item


def due(done: int, every: int) -> bool:
    return bool(every) and done % every == 0


def log_row(metrics: dict[str, jax.Array]) -> dict[str, float]:
    """One line of metrics, fetched from the devices. What is not finite is left out: ``skipped.jsonl`` tells of it."""
    host: dict[str, Any] = jax.device_get(metrics)
    groups = group_metrics(host.pop("group_loss"), host.pop("group_weight"), GROUP_NAMES)
    host["token_accuracy"] = float(host.pop("correct")) / (float(host["weight"]) or 1.0)
    row = {name: float(value) for name, value in host.items()} | groups
    return {name: value for name, value in row.items() if math.isfinite(value)}


def evaluate(
    evaluator: Evaluator, made: setup.Prepared, state: dict[str, Any], writer: MetricsWriter, done: int
) -> dict[str, float]:
    """Accuracy of generated answers; some of them go to TensorBoard with their pictures."""
    with made.step.in_force():
        result = evaluator(phivision.merge(made.step.graphdef, state["params"]))
    shown = [evaluator.dataset[int(i)] for i in evaluator.records[: made.cfg.samples]]
    writer.write_images(done, "samples", answer_images(shown, result.answers))
    return {"eval/accuracy": result.accuracy, "eval/examples": len(result.answers)}


def say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells every file it writes
    config, run = flags.FLAGS.config, flags.FLAGS.run
    if config is None or run is None:
        sys.exit(
            "train.py: both --config and --run are needed: python train.py --config=configs/tiny.py --run=runs/tiny"
        )
    try:
        processes.initialize()
        processes.exit_on_signal()
        cfg = config_of_flags()
    except ValueError as error:
        sys.exit(f"train.py: {error}")
    with processes.propagate_failure("train.py", EXPECTED):
        if flags.FLAGS.replay is not None:
            replay(cfg, run, flags.FLAGS.replay, say)
            return
        code = train(cfg, run)
    sys.exit(code)


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parser, whose errors become a sentence. ml_collections raises at a field that does not exist.

    With a configuration, --help shows its fields.
    """
    try:
        if not (help_page.asked_for(argv) and any(word.startswith("--config") for word in argv)):
            return flags.FLAGS(argv)
        flags.FLAGS([word for word in argv if word not in help_page.FLAGS])
        page = help_page.text(config_of_flags())
    except OSError as error:
        sys.exit(f"train.py: {no_config_file(error)}")
    except SyntaxError as error:
        sys.exit(f"train.py: --config: {error}")
    except flags.Error as error:  # what a configuration raises stands at the end of all that ml_collections tells of it
        said = str(error).strip().splitlines()[-1].strip().removeprefix("ValueError: ")
        sys.exit(f"train.py: {said}; python train.py --help shows how")
    except (AttributeError, KeyError, ValueError) as error:
        sys.exit(f"train.py: {no_such_field(error, argv) or error}")
    print(__doc__, page, sep="\n")  # not above: a reader that closes the pipe is no missing file
    sys.exit(0)


def config_of_flags() -> RunConfig:
    """What --config and the fields given beside it say.

    Raises:
      ValueError: for a file that cannot be read, which ml_collections says when it is first asked for a field.
    """
    try:
        values = flags.FLAGS.config.to_dict()
    except OSError as error:
        raise ValueError(no_config_file(error)) from None
    return RunConfig.from_dict(values)


def no_config_file(error: OSError) -> str:
    cause = re.sub(r"(?s).*\[Errno \d+\] ", "", str(error))  # behind all the ways that ml_collections tried
    return f"--config: {cause.rstrip('.')}; give a file like configs/tiny.py"


def no_such_field(error: Exception, argv: list[str]) -> str:
    """The argument that names a field that does not exist, and the nearest one; empty for any other error."""
    said = str(error)  # "'zzz'", or with a second line of advice; in quotes that are quoted again
    field = re.sub(r"^\W*(\w*).*", r"\1", said, flags=re.DOTALL)
    arguments = [word for word in argv if re.search(rf"^--config\.(\w+\.)*{field}\b", word)]
    if not field or not arguments:
        return ""
    nearest = re.search(r'Did you mean "(.+?)"', said)
    advice = f"did you mean {nearest[1]}?" if nearest else "python train.py --config=FILE --help lists all there are"
    return f"{arguments[0]}: there is no field {field}; {advice}"


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
