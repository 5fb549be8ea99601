"""One run that is killed and stopped again and again, compared with the same run left undisturbed.

    phivision data import easy-vqa data/easy_vqa --questions-per-record 3
    python benchmarks/kill.py --kills 100 --terms 20 --steps 1000 --seed 0 [--out docs/results/kill.json]

A small model learns easy-VQA in two processes on CPUs, with a checkpoint every 20 steps, twice: undisturbed, and with
the launcher restarting it after each of many SIGKILLs and SIGTERMs. A seed decides which process receives which signal,
and when: one in five comes while processes start (importing, compiling, restoring), the others after a random number of
new steps and a random part of a second, so that they hit steps, checkpoints being written and checkpoints being sealed.
They are spread so that the last one comes near the end.

Expected: losses, records of each step and the checksums of the final checkpoint are those of the undisturbed run, bit
for bit, and no file is left over. Prints a table; exits with 1 if anything differs.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.support.disturbed import DisturbedRun, Outcome, differences, left_over, sample_disturbances

EVERY = 20
"""Steps between checkpoints."""


def training_command(run: Path, data: Path, steps: int, work: Path) -> list[str]:
    """configs/tiny.py, as small as still learns."""
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
    result.add_row("steps lost and repeated", str(calm.steps_lost), str(wild.steps_lost))
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
    """Kill a run again and again, and compare it with one that was left undisturbed.

    Args:
        kills: Number of SIGKILLs.
        terms: Number of SIGTERMs.
        steps: Steps of the run.
        seed: Seed for the disturbances.
        processes: Processes of the run.
        data: Directory that phivision data import easy-vqa has written.
        work: Directory for both runs; removed first.
        out: Also write the results to this file, as JSON.
    """
    if not (data / "train" / "manifest.json").exists():
        sys.exit(f"kill.py: {data} holds no easy-VQA; phivision data import easy-vqa {data} makes it")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    work, data = work.absolute(), data.absolute()
    runs = [work / "undisturbed", work / "disturbed"]
    started = (
        DisturbedRun(training_command(run, data, steps, work), run, processes, steps, EVERY, run.with_suffix(".log"))
        for run in runs
    )
    calm = next(started).undisturbed()
    print(f"undisturbed: {calm.wall_s:.0f} s, the first step after {calm.starting_s:.0f} s", flush=True)
    if calm.code != 0:
        sys.exit(f"kill.py: the undisturbed run ended with {calm.code}; see {runs[0].with_suffix('.log')}")
    wild = next(started).disturbed(sample_disturbances(kills, terms, processes, seed), calm.starting_s)
    found, rest = differences(runs[0], runs[1], processes), left_over(runs[0], runs[1])
    Console().print(table(calm, wild, found, rest))
    if out:
        arguments = {"kills": kills, "terms": terms, "steps": steps, "seed": seed, "processes": processes}
        outcomes = {"undisturbed": dataclasses.asdict(calm), "disturbed": dataclasses.asdict(wild)}
        out.write_text(json.dumps({**arguments, **outcomes, "differences": found, "left_over": rest}, indent=1) + "\n")
    complete = wild.code == 0 and wild.sent == {"SIGKILL": kills, "SIGTERM": terms}
    sys.exit(0 if complete and not found and not rest else 1)


if __name__ == "__main__":
    tyro.cli(main)
