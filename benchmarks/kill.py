"""One training that is killed and told to stop again and again, beside the same training left alone.

    phivision data import easy-vqa data/easy_vqa --questions-per-record 3
    python benchmarks/kill.py --kills 100 --terms 20 --steps 1000 --seed 0 [--out docs/results/kill.json]

A small model learns easy-VQA in two processes on CPUs, a checkpoint every 20 steps, twice: undisturbed, then with the
launcher starting it again after each of so many SIGKILLs and SIGTERMs. A seed draws which process, which signal and
when: one in five falls while processes are starting (importing, compiling, restoring), the others after a random
number of new steps, then a random part of a second later, so that they hit steps, checkpoints being written and
checkpoints being sealed alike. They are spread so that the last one falls near the end.

Wanted: the losses, the records of each step and the final checkpoint's checksums are those of the undisturbed run, bit
for bit, and nothing is left lying that one would have to remove. Prints the table; exits with 1 if anything differs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from phivision_jax.checkpoint.layout import CHECKPOINTS, CHECKSUMS, META
from phivision_jax.io.progress import bar
from phivision_jax.training.telemetry import record_log
from phivision_jax.training.telemetry.metrics import FILE, read_metrics

ROOT = Path(__file__).parents[1]
EVERY = 20
"""Steps between checkpoints."""
STARTING_SHARE = 0.2
PATIENCE_S = 600.0
"""Without a start, an end or a step for so long, the training hangs."""
_POLL_S = 0.05
_STARTED = "launch: started process"
_PID = re.compile(r"\(pid (\d+)\)")


@dataclasses.dataclass(frozen=True)
class Disturbance:
    """One signal to one process."""

    signal: int
    process: int
    starting: bool
    """It falls before the first step of a start."""
    when: float
    """In [0, 1): of the time that starting takes, or of the steps that there are for it."""
    delay_s: float


@dataclasses.dataclass
class Outcome:
    """What became of a training."""

    code: int | None = None
    wall_s: float = 0.0
    starts: int = 0
    sent: dict[str, int] = dataclasses.field(default_factory=lambda: {"SIGKILL": 0, "SIGTERM": 0})
    steps_lost: int = 0
    """Steps that were computed, and again after a later start."""
    starting_s: float = 0.0
    """From a start to its first step: undisturbed it compiles; disturbed it is the last that came so far."""


def draw(kills: int, terms: int, processes: int, seed: int) -> list[Disturbance]:
    """The disturbances in order, from a seed."""
    rng = random.Random(seed)
    numbers = [signal.SIGKILL] * kills + [signal.SIGTERM] * terms
    rng.shuffle(numbers)
    return [
        Disturbance(
            number, rng.randrange(processes), rng.random() < STARTING_SHARE, rng.random(), 0.3 * rng.random() ** 2
        )
        for number in numbers
    ]


class Training:
    """A training under the launcher, watched through its files.

    Args:
      command: what each process runs; it writes to ``run``.
      steps: how many it takes.
      log: what launcher and processes print.
    """

    def __init__(self, command: Sequence[str], run: Path, processes: int, steps: int, log: Path) -> None:
        self.run, self.steps, self.log = run, steps, log
        launcher = [
            sys.executable,
            "-m",
            "phivision_jax.distributed.launch",
            "--processes",
            str(processes),
            "--restarts",
            "9999",
        ]
        with log.open("wb") as file:
            self.launcher = subprocess.Popen([*launcher, "--", *command], cwd=ROOT, stdout=file, stderr=file)
        self.outcome = Outcome()
        self._began = time.monotonic()

    def undisturbed(self) -> Outcome:
        """Wait for its end."""
        self._until(lambda: self.newest() > 0, "the first step")
        self.outcome.starting_s = time.monotonic() - self._began
        return self._end()

    def disturbed(self, disturbances: Sequence[Disturbance], starting_s: float) -> Outcome:
        """Carry out all disturbances, then wait for its end. Where it ends before, ``sent`` tells.

        Args:
          starting_s: how long starting takes, until that is known better.
        """
        self.outcome.starting_s = starting_s
        with bar("disturbances", len(disturbances), shown=sys.stdout.isatty()) as advance:
            for i, disturbance in enumerate(disturbances):
                self._until(lambda i=i: len(self.starts()) > i, f"start {i + 1}")  # type: ignore[misc]
                self._await(disturbance, len(disturbances) - i)
                if self.launcher.poll() is not None:
                    break
                newest = self.newest()
                with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
                    os.kill(self.starts()[i][disturbance.process], disturbance.signal)
                    self.outcome.sent[signal.Signals(disturbance.signal).name] += 1
                self._until(lambda i=i: len(self.starts()) > i + 1, f"start {i + 2}")  # type: ignore[misc]
                self.outcome.steps_lost += max(newest - self.saved(), 0)
                advance(1)
        return self._end()

    def _await(self, disturbance: Disturbance, left: int) -> None:
        """Wait for a disturbance's time: a part of starting; or as many steps as there are for each that is left, and
        those that a kill throws away on average, twice as many at most."""
        first, before, began = self.saved(), self._file(), time.monotonic()
        at = began + disturbance.when * self.outcome.starting_s if disturbance.starting else math.inf
        # The metrics of an earlier start are replaced when the training begins.
        self._until(lambda: self._file() != before or time.monotonic() >= at, "training")
        if self._file() != before:
            self.outcome.starting_s = time.monotonic() - began
        if disturbance.starting:
            return
        most = 2 * ((self.steps - first) / (left + 1) + EVERY / 2)
        # A SIGTERM takes a second or two until all have agreed; it must not come to the end of the training.
        aim = min(first + 1 + int(disturbance.when * most), self.steps - 2 * EVERY)
        self._until(lambda: self.newest() >= aim, f"step {aim}")
        until = time.monotonic() + disturbance.delay_s
        self._until(lambda: time.monotonic() >= until, "some time")

    def _until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for something, or the launcher's end."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition() and self.launcher.poll() is None:
            if time.monotonic() > deadline:
                self.launcher.terminate()
                raise TimeoutError(f"{what} has not come in {PATIENCE_S:.0f} s; see {self.log}")
            time.sleep(_POLL_S)

    def _end(self) -> Outcome:
        self.outcome.code, self.outcome.wall_s = self.launcher.wait(), time.monotonic() - self._began
        self.outcome.starts = len(self.starts())
        return self.outcome

    def starts(self) -> list[list[int]]:
        """The ids of the processes of each start so far."""
        lines = (line for line in self.log.read_text(errors="replace").splitlines() if line.startswith(_STARTED))
        return [[int(pid) for pid in _PID.findall(line)] for line in lines]

    def newest(self) -> int:
        """The last step in the metrics."""
        if not (path := self.run / FILE).exists():
            return 0
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - 100_000, 0))
            lines = file.read().split(b"\n")
        steps = [int(line.split(b":", 1)[1].split(b",", 1)[0]) for line in lines[:-1] if line.startswith(b'{"step": ')]
        return steps[-1] if steps else 0

    def saved(self) -> int:
        """The newest checkpoint's step."""
        folder = self.run / CHECKPOINTS
        return max((int(path.name) for path in folder.glob("*") if path.name.isdecimal()), default=0)

    def _file(self) -> int | None:
        path = self.run / FILE
        return path.stat().st_ino if path.exists() else None


def differences(left: Path, right: Path, processes: int) -> dict[str, str]:
    """Where two runs first differ: {what: where}; empty: nowhere."""
    found = {}
    losses = [[(row["step"], row["loss"]) for row in read_metrics(run) if "loss" in row] for run in (left, right)]
    if losses[0] != losses[1]:
        found["losses"] = _first(*losses)
    for process in range(processes):
        lines = [record_log.path_of(run, process).read_text().splitlines() for run in (left, right)]
        if lines[0] != lines[1]:
            found[f"records of process {process}"] = _first(*lines)
    sums = [_checksums(run) for run in (left, right)]
    if sums[0] != sums[1]:
        found["final state"] = _first(*(sorted(s.items()) for s in sums))
    return found


def _first(left: Sequence[Any], right: Sequence[Any]) -> str:
    for a, b in zip(left, right, strict=False):
        if a != b:
            return f"{a} against {b}"
    return f"{len(left)} against {len(right)} entries"


def _checksums(run: Path) -> dict[str, str]:
    newest = max((path for path in (run / CHECKPOINTS).glob("*") if path.name.isdecimal()), key=lambda p: int(p.name))
    return json.loads((newest / META / "metadata").read_text())[CHECKSUMS]


def left_over(left: Path, right: Path) -> list[str]:
    """What lies in the second run and not in the first, by name.

    The last few checkpoints are kept in both; in the second, one that was saved on SIGTERM may be among them.
    """
    names = [
        {path.relative_to(run).as_posix() for folder in (run, run / CHECKPOINTS) for path in folder.iterdir()}
        for run in (left, right)
    ]
    kept = [{name for name in found if re.fullmatch(rf"{CHECKPOINTS}/\d+", name)} for found in names]
    more = [] if len(kept[1]) > len(kept[0]) else kept[1]
    return sorted(names[1] - names[0] - set(more))


def training_command(run: Path, data: Path, steps: int, work: Path) -> list[str]:
    """configs/tiny.py as small as it learns at all: what is measured is dying."""
    overrides = {
        "model.vision.hidden_size": 32,
        "model.vision.intermediate_size": 64,
        "model.vision.num_layers": 2,
        "model.decoder.hidden_size": 32,
        "model.decoder.intermediate_size": 64,
        "model.decoder.num_layers": 2,
        "data.path": data / "train",
        "data.eval_path": "",
        "data.epochs": 1,
        "optim.steps": steps,
        "log_every": 1,
        "eval_every": 0,
        "checkpoint_every": EVERY,
    }
    words = [f"--config.{name}={value}" for name, value in overrides.items()]
    return ["env", "JAX_PLATFORMS=cpu", f"JAX_COMPILATION_CACHE_DIR={work / 'compiled'}",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0", sys.executable, "train.py",
            "--config=configs/tiny.py", f"--run={run}", *words]  # fmt: skip


def table(calm: Outcome, wild: Outcome, found: dict[str, str], rest: list[str]) -> Table:
    result = Table("", "undisturbed", "disturbed")
    for name in ("SIGKILL", "SIGTERM"):
        result.add_row(f"{name}s", str(calm.sent[name]), str(wild.sent[name]))
    result.add_row("starts", str(calm.starts), str(wild.starts))
    result.add_row("steps lost and done again", str(calm.steps_lost), str(wild.steps_lost))
    result.add_row("wall time", f"{calm.wall_s:.0f} s", f"{wild.wall_s:.0f} s")
    result.add_row("exit code", str(calm.code), str(wild.code))
    for what in ("losses", "records", "final state"):
        where = [f"{name}: {place}" for name, place in found.items() if name.startswith(what)]
        result.add_row(what, "", "; ".join(where) or "equal, bit for bit")
    result.add_row("left over", "", ", ".join(rest) or "nothing")
    return result


def main(
    kills: int = 100,
    terms: int = 20,
    steps: int = 1000,
    seed: int = 0,
    processes: int = 2,
    data: Path = Path("data/easy_vqa"),
    work: Path = Path("runs/kill"),
    out: Path | None = None,
) -> None:
    """Kill a training again and again, and compare it with one that was left alone.

    Args:
        kills: How many SIGKILLs.
        terms: How many SIGTERMs.
        steps: Of the training.
        seed: Of the disturbances.
        processes: Of the training.
        data: Where phivision data import easy-vqa has written.
        work: Where both runs go; removed first.
        out: Also write the figures here, as JSON.
    """
    if not (data / "train" / "manifest.json").exists():
        sys.exit(f"kill.py: {data} does not hold easy-VQA; phivision data import easy-vqa {data} makes it")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    work, data = work.absolute(), data.absolute()
    runs = [work / "undisturbed", work / "disturbed"]
    trainings = (
        Training(training_command(run, data, steps, work), run, processes, steps, run.with_suffix(".log"))
        for run in runs
    )
    calm = next(trainings).undisturbed()
    print(f"undisturbed: {calm.wall_s:.0f} s, the first step after {calm.starting_s:.0f} s", flush=True)
    if calm.code != 0:
        sys.exit(f"kill.py: the undisturbed training ended with {calm.code}; see {runs[0].with_suffix('.log')}")
    wild = next(trainings).disturbed(draw(kills, terms, processes, seed), calm.starting_s)
    found, rest = differences(runs[0], runs[1], processes), left_over(runs[0], runs[1])
    Console().print(table(calm, wild, found, rest))
    if out:
        arguments = {"kills": kills, "terms": terms, "steps": steps, "seed": seed, "processes": processes}
        outcomes = {"undisturbed": dataclasses.asdict(calm), "disturbed": dataclasses.asdict(wild)}
        out.write_text(json.dumps({**arguments, **outcomes, "differences": found, "left_over": rest}, indent=1) + "\n")
    whole = wild.code == 0 and wild.sent == {"SIGKILL": kills, "SIGTERM": terms}
    sys.exit(0 if whole and not found and not rest else 1)


if __name__ == "__main__":
    tyro.cli(main)
