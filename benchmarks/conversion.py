"""Speed and memory of the converter, compared with a plain copy of the same bytes in the same run.

    python benchmarks/conversion.py --gb 6 [--results conversion.json]

Each step runs in its own process. Time is wall time until everything is on disk (the converter flushes before its
rename; the copy is followed by the same fsync of every file), memory the peak resident set. The page cache is left
alone: the source was just written, so all steps find as much of it cached as fits in memory. The copy is timed first
and last, because disks drift.
"""

from __future__ import annotations

import filecmp
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

_ROOT = Path(__file__).resolve().parent.parent
_COPY = """
import pathlib, shutil, sys
from phivision_jax.io.atomic import sync_tree
shutil.copytree(*sys.argv[1:])
sync_tree(pathlib.Path(sys.argv[2]))
"""


@dataclass(frozen=True)
class Result:
    """One line of the table."""

    step: str
    seconds: float
    mb_per_s: float
    peak_rss_gb: float


def time_process(step: str, nbytes: int, *command: str) -> Result:
    """Run one process and measure its wall time and peak memory."""
    os.sync()
    start = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(_ROOT), "JAX_PLATFORMS": "cpu"}
    pid = os.posix_spawn(sys.executable, [sys.executable, "-P", *command], environment)
    _, status, usage = os.wait4(pid, 0)
    seconds = time.perf_counter() - start
    if status:
        sys.exit(f"{step} failed")
    unit = 1 if platform.system() == "Darwin" else 1024
    return Result(step, seconds, nbytes / seconds / 1e6, usage.ru_maxrss * unit / 1e9)


def main(gb: float = 6.0, directory: Path | None = None, results: Path | None = None) -> None:
    """Make a random checkpoint, convert it both ways, copy it, print the table.

    Args:
        gb: Size of the checkpoint in 10⁹ bytes; the benchmark needs four times as much disk.
        directory: Working directory; default: the system's temporary directory.
        results: Write the numbers to this JSON file as well.
    """
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        work = Path(folder)
        source, ours, back, copied = (work / name for name in ("source", "ours", "back", "copied"))
        time_process("make", 0, str(_ROOT / "benchmarks" / "make_checkpoint.py"), str(source), "--gb", str(gb))
        nbytes = sum(path.stat().st_size for path in source.iterdir())
        rows = [time_process("plain copy, first", nbytes, "-c", _COPY, str(source), str(copied))]
        shutil.rmtree(copied)
        rows.append(time_process("to-jax", nbytes, "-m", "convert", "to-jax", str(source), str(ours)))
        rows.append(
            time_process("to-hf --like", nbytes, "-m", "convert", "to-hf", str(ours), str(back), "--like", str(source))
        )
        rows.append(time_process("verify", nbytes, "-m", "convert", "verify", str(source), str(ours)))
        rows.append(time_process("plain copy, last", nbytes, "-c", _COPY, str(source), str(copied)))
        names = sorted(path.name for path in source.iterdir())
        _, differ, errors = filecmp.cmpfiles(source, back, names, shallow=False)
    print(f"\n{nbytes / 1e9:.2f} GB; identical after the round trip: {not differ and not errors}\n")
    print(f"{'step':<20}{'seconds':>9}{'MB/s':>8}{'peak RSS, GB':>14}")
    for row in rows:
        print(f"{row.step:<20}{row.seconds:>9.1f}{row.mb_per_s:>8.0f}{row.peak_rss_gb:>14.2f}")
    if results is not None:
        content = {"bytes": nbytes, "identical": not differ and not errors, "steps": [asdict(row) for row in rows]}
        results.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    tyro.cli(main)
