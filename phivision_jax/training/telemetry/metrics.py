"""Metrics of a run: one JSON object per line in ``metrics.jsonl``; the same in TensorBoard, and in W&B where asked.

The file is the truth: a start that goes on from a checkpoint drops the lines beyond it. TensorBoard is told to hide
them. Weights & Biases keeps what it was once sent, so there steps that were done again appear twice, equal.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image
from tensorboardX import SummaryWriter

from phivision_jax.io.atomic import with_filename

FILE = "metrics.jsonl"
WANDB_ID = "wandb_id"
"""The file that holds the id of the run at Weights & Biases."""


class MetricsWriter:
    """Appends to a run's metrics; the first process alone writes, the others' calls do nothing.

    Args:
      run: the run's directory.
      from_step: where training begins. Lines of later steps are what an earlier start did and lost; they are dropped,
        so that the file always tells one story.
      wandb: project of Weights & Biases to log to as well; a run that is started again goes on under its id there.
        WANDB_MODE=offline and its other environment variables say where to. Empty for none.
      config: what W&B shows as the run's configuration.

    Raises:
      ModuleNotFoundError: when ``wandb`` names a project and the package is not installed.
      ValueError: when W&B does not start.
    """

    def __init__(
        self, run: Path, from_step: int = 0, *, wandb: str = "", config: Mapping[str, Any] | None = None
    ) -> None:
        self._path = path = run / FILE
        kept = [row for row in read_metrics(run) if row["step"] <= from_step] if from_step else []
        self.elapsed = float(kept[-1].get("elapsed_s", 0.0)) if kept else 0.0
        """Seconds that training took until ``from_step``."""
        self.measured = {name for row in kept if row["step"] == from_step for name in row}
        """What is there of ``from_step``."""
        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        # First: where it fails, nothing has been dropped yet.
        self._wandb = _start_wandb(wandb, run, config or {}) if wandb else None
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        temporary.replace(path)
        self._file = path.open("a")
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=from_step + 1, write_to_disk=True)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line, flushed: it is there if the process dies next. Floats are written so that they read back equal.

        What is not finite is left out: JSON has no word for it, and ``skipped.jsonl`` tells of the step.
        """
        if not self._writes:
            return
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        with with_filename(self._path):
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log({"step": step, **values})

    def write_images(self, step: int, tag: str, pictures: Sequence[Image.Image]) -> None:
        """Pictures, to TensorBoard (each under ``tag/0``, ``tag/1``, …) and W&B."""
        if not self._writes:
            return
        for i, picture in enumerate(pictures):
            self._board.add_image(f"{tag}/{i}", np.asarray(picture.convert("RGB")), step, dataformats="HWC")
        self._board.flush()
        if self._wandb:
            import wandb

            self._wandb.log({"step": step, tag: [wandb.Image(picture) for picture in pictures]})

    def write_text(self, step: int, tag: str, text: str) -> None:
        """Markdown, to TensorBoard; W&B has it as it stands."""
        if not self._writes:
            return
        self._board.add_text(tag, text, step)
        self._board.flush()
        if self._wandb:
            self._wandb.log({"step": step, tag: text})

    def close(self) -> None:
        if not self._writes:
            return
        self._file.close()
        self._board.close()
        if self._wandb:
            self._wandb.finish()


def _start_wandb(project: str, run: Path, config: Mapping[str, Any]) -> Any:
    """The run at Weights & Biases: this directory's own, made at its first start."""
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"wandb is {project!r}, but the package is not installed: pip install 'phivision_jax[wandb]', or leave "
            "--config.wandb empty"
        ) from error
    where = run / WANDB_ID
    if not where.exists():
        temporary = where.with_suffix(".tmp")
        temporary.write_text(secrets.token_hex(4))
        temporary.replace(where)
    try:
        started = wandb.init(
            project=project, id=where.read_text(), resume="allow", name=run.name, dir=str(run), config=dict(config)
        )
    except Exception as error:  # no login, no network: a package that is not always here has its own types
        raise ValueError(
            f"W&B does not start: {error}; run `wandb login`, set WANDB_API_KEY or WANDB_MODE=offline, or leave "
            "--config.wandb empty"
        ) from error
    # Its own counter of steps refuses to go back, and a start after a kill does.
    started.define_metric("step")
    started.define_metric("*", step_metric="step")
    return started


def read_metrics(run: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics; a last line cut off by a kill is left out."""
    rows = []
    path = run / FILE
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def group_metrics(loss: np.ndarray, weight: np.ndarray, names: tuple[str, ...]) -> dict[str, float]:
    """Mean loss of each mode × task that a step saw: {"loss/nothink/general": …}."""
    return {f"loss/{name}": float(s / w) for name, s, w in zip(names, loss, weight, strict=True) if w > 0}
