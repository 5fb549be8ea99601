"""Metrics of a run: one JSON object per line in ``metrics.jsonl``, and the same numbers in TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tensorboardX import SummaryWriter

from phivision_jax.batch import Batch

FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends to a run's metrics.

    Args:
      run: the run's directory.
      from_step: where training begins. Lines of later steps are what an earlier start did and lost; they are dropped,
        so that the file always tells one story.
    """

    def __init__(self, run: Path, from_step: int = 0) -> None:
        self._path = run / FILE
        kept = [row for row in read_metrics(run) if row["step"] <= from_step] if from_step else []
        self.elapsed = float(kept[-1].get("elapsed_s", 0.0)) if kept else 0.0
        """Seconds that training took until ``from_step``."""
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        temporary.replace(self._path)
        self._file = self._path.open("a")
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=from_step + 1, write_to_disk=True)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line, flushed: it is there if the process dies next. Floats are written so that they read back equal."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


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


def batch_metrics(batch: Batch) -> dict[str, float]:
    """What a host batch holds: text and patch padding as shares, real tokens, images."""
    text, vision = np.asarray(batch.segment_ids), np.asarray(batch.patch_segments)
    return {
        "text_padding": float((text == 0).mean()),
        "patch_padding": float((vision == 0).mean()) if vision.size else 0.0,
        "tokens": int((text > 0).sum()),
        "images": int(vision.max(-1).sum()) if vision.size else 0,
    }
