"""Which records each step was made of: ``records_<process>.jsonl`` of a run, one line per step.

    {"step": 1234, "ids": [["photo/17", "photo/3"], ["chart/905"]]}        per row of this process, as packed

Step s is the update after which the state's step is s, as in ``metrics.jsonl``. It follows from the plan; it is written
so that a spike in the loss can be looked up, and so that it can be shown that a run which was killed saw what an
undisturbed one sees. About 20 MB per host for the whole recipe.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from phivision_jax.io.atomic import with_filename


def path_of(run: Path, process: int) -> Path:
    return run / f"records_{process}.jsonl"


class RecordLog:
    """Appends to a process's list.

    Args:
      from_step: where training begins; lines of later steps are of an earlier start, which lost them.
    """

    def __init__(self, run: Path, process: int, from_step: int) -> None:
        self._path = path_of(run, process)
        cut(self._path, from_step)
        self._file = self._path.open("ab")

    def write(self, step: int, ids: Sequence[Sequence[str]]) -> None:
        with with_filename(self._path):
            self._file.write(json.dumps({"step": step, "ids": ids}, ensure_ascii=False).encode() + b"\n")
            self._file.flush()

    def close(self) -> None:
        self._file.close()


def cut(path: Path, from_step: int) -> None:
    """Drop a file's lines of later steps, and a last one that a kill has cut short; where there is no file, nothing."""
    if not path.exists():
        return
    lines = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    partial = path.with_suffix(".partial")
    partial.write_bytes(b"".join(line for line in lines if json.loads(line)["step"] <= from_step))
    partial.replace(path)


def cut_all(run: Path, from_step: int) -> None:
    """``cut`` what every process has logged by step: a start with fewer processes goes on with the rows of all."""
    for pattern in ("records_*.jsonl", "skipped*.jsonl"):
        for path in run.glob(pattern):
            cut(path, from_step)
