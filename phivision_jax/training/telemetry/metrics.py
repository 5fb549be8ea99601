"""Metrics of a run: one JSON object per line in ``metrics.jsonl``; the same in TensorBoard, and in W&B on request.

The file is authoritative: a start drops the lines beyond the checkpoint that it resumes from, and TensorBoard hides
them. Weights & Biases keeps everything it received, so repeated steps appear twice there, with equal numbers.
"""

import contextlib
import functools
import importlib
import math
import secrets
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image
from tensorboardX import SummaryWriter

from phivision_jax.checkpoint.layout import COMMAND, CONFIG
from phivision_jax.io import atomic, jsonl

FILE = "metrics.jsonl"
WANDB_ID = "wandb_id"
"""File that holds the run's id at Weights & Biases."""


class MetricsWriter:
    """Append to a run's metrics. Only the first process writes; the calls of others do nothing.

    Args:
      run: the run's directory.
      from_step: the step that training resumes from; later lines are dropped.
      wandb: Weights & Biases project to log to in addition; empty for none. A restarted run continues under its id.
        W&B's environment variables (WANDB_MODE=offline, …) apply.
      config: the run's configuration, for W&B.

    Raises:
      ModuleNotFoundError: when ``wandb`` names a project and the package is not installed.
      ValueError: when W&B does not start.
    """

    def __init__(self, run: Path, from_step: int = 0, *, wandb: str = "", config: dict[str, Any] | None = None) -> None:
        self._path = run / FILE
        kept = [row for row in read_metrics(run) if row["step"] <= from_step]
        self.elapsed = float(kept[-1].get("elapsed_s", 0.0)) if kept else 0.0
        """Seconds of training until ``from_step``."""
        self.logged = {name for row in kept if row["step"] == from_step for name in row}
        """Names of the metrics that ``from_step`` has."""
        self._writes = jax.process_index() == 0
        if self._writes:
            # First: if it fails, nothing has been dropped.
            self._wandb = _start_wandb(wandb, run, config or {}) if wandb else None
            jsonl.truncate(self._path, from_step)
            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=from_step + 1, write_to_disk=True)
            _tolerate_full_disk(self._board)
            for file in (run / CONFIG, run / COMMAND):
                if file.exists():
                    self._board.add_text(file.stem, textwrap.indent(file.read_text(), "    "), from_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write one line, at once. Floats read back equal; values that are not finite are omitted (JSON has none)."""
        if not self._writes:
            return
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        jsonl.append(self._path, {"step": step, **values})
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log({"step": step, **values})

    def write_images(self, step: int, tag: str, images: Sequence[Image.Image]) -> None:
        """Write images to TensorBoard (as ``tag/0``, ``tag/1``, …) and W&B."""
        if not self._writes:
            return
        for i, image in enumerate(images):
            self._board.add_image(f"{tag}/{i}", np.asarray(image.convert("RGB")), step, dataformats="HWC")
        self._board.flush()
        if self._wandb:
            import wandb

            self._wandb.log({"step": step, tag: [wandb.Image(image) for image in images]})

    def close(self) -> None:
        if self._writes:
            self._board.close()
            if self._wandb:
                self._wandb.finish()


def _tolerate_full_disk(board: SummaryWriter) -> None:
    """Let TensorBoard's events be lost when they cannot be written; other files report the disk.

    Otherwise the thread that writes them would end with a traceback, and the queue to it would block training.
    """
    file = board.file_writer.event_writer._ev_writer

    def tolerant(write: Callable[..., None], *args: Any) -> None:
        with contextlib.suppress(OSError):
            write(*args)

    for name in ("write_event", "flush", "close"):
        setattr(file, name, functools.partial(tolerant, getattr(file, name)))


def import_wandb(project: str) -> Any:
    """The package, or ModuleNotFoundError when it is not installed."""
    try:
        return importlib.import_module("wandb")
    except ModuleNotFoundError as error:
        remedy = "pip install 'phivision_jax[wandb]', or leave --config.wandb empty"
        raise ModuleNotFoundError(f"wandb is {project!r}, but the package is not installed: {remedy}") from error


def _start_wandb(project: str, run: Path, config: Mapping[str, Any]) -> Any:
    """Start or continue this directory's run at Weights & Biases."""
    wandb, file = import_wandb(project), run / WANDB_ID
    if not file.exists():
        atomic.write(file, secrets.token_hex(4))
    names = {"project": project, "id": file.read_text(), "name": run.name, "dir": str(run)}
    try:
        started = wandb.init(**names, resume="allow", config=dict(config))
    except Exception as error:  # no login, no network: the optional package has its own exception types
        remedy = "run `wandb login`, set WANDB_API_KEY or WANDB_MODE=offline, or leave --config.wandb empty"
        raise ValueError(f"W&B does not start: {error}; {remedy}") from error
    # W&B's own step counter refuses to go back, as a restart after a kill does.
    started.define_metric("step")
    started.define_metric("*", step_metric="step")
    return started


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Read a run's metrics, one dict per line; a damaged line is ignored."""
    rows = jsonl.read(run / FILE, step=int)
    return [row for row in rows if all(jsonl.is_a(value, float) for value in row.values())]


def group_metrics(name: str, groups: Sequence[str], loss: np.ndarray, weight: np.ndarray) -> dict[str, float]:
    """Mean loss of each mode and task that has targets, from sums: {"loss/nothink/general": …} for name "loss"."""
    sums = zip(groups, loss, weight, strict=True)
    return {f"{name}/{group}": float(total / weights) for group, total, weights in sums if weights > 0}
