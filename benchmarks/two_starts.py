"""Runs that are started twice: at one moment, apart, on hosts whose clocks differ, in a bucket, after kills.

    python benchmarks/two_starts.py --trials 50 [--out docs/results/two_starts.json]

Every trial is two real processes that start one run. Exactly one may train. The other must name its process and host,
exit with 1, and leave every file as it was. The processes write files as a training run does, without a model; a few
more trials are complete training runs. Hosts and their clocks are simulated in the processes; the bucket is served on
this machine. Prints a table; exits with 1 if a trial finds a problem.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from phivision_jax.distributed import run_lock
from phivision_jax.io import progress
from tests.support import two_starts
from tests.support.bucket_emulator import Emulator
from tests.support.paths import ROOT
from tests.support.runs import SHORT, command, environment, losses, write_data
from tests.support.two_starts import KINDS, Kind, Outcome


def real_trial(data: Path, run: Path) -> list[str]:
    """Start ``phivision train`` twice at one moment; returns what is wrong."""
    words = command(data, run, *SHORT)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    both = [subprocess.Popen(words, cwd=ROOT, env=environment(), **pipes) for _ in range(2)]  # type: ignore[call-overload]
    with ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(lambda process: process.communicate()[0], both))
    codes = [process.returncode for process in both]
    if sorted(codes) != [0, 1]:
        return [f"exit codes {codes}: {outputs}"]
    first, second = codes.index(0), codes.index(1)
    found = []
    if not re.search(rf"is being trained already, by process {both[first].pid} on \S+ since 2", outputs[second]):
        found.append(f"the other did not name {both[first].pid}: {outputs[second]}")
    if sorted(losses(run)) != list(range(1, 13)):
        found.append(f"{run} has the steps {sorted(losses(run))}")
    return found


def main(
    trials: int = 50,
    real: int = 3,
    at_once: int = 2,
    longest_s: float = 60.0,
    renew_s: float = run_lock.RENEW_S,
    silent_s: float = run_lock.SILENT_S,
    seed: int = 0,
    only: str = "",
    work: Path = Path("runs/two_starts"),
    out: Path | None = None,
) -> None:
    """Start runs twice, in many ways.

    Args:
        trials: Trials of each kind.
        real: Trials with complete training runs.
        at_once: Trials that run at the same time.
        longest_s: Longest time between two starts that are apart.
        renew_s: Seconds between renewals of the lock.
        silent_s: Seconds of silence after which an owner on another host counts as gone.
        seed: Seed for the times between starts.
        only: Regular expression of the kinds to try; the file keeps its rows of the others.
        work: Directory for the runs; removed first.
        out: Also write the results to this file, as JSON.
    """
    shutil.rmtree(work, ignore_errors=True)
    work = work.absolute()
    work.mkdir(parents=True)
    kinds = [kind for kind in KINDS if re.search(only, str(kind))]
    results: dict[str, list[Outcome]] = {str(kind): [] for kind in kinds}
    jobs = [(kind, number) for kind in kinds for number in range(trials)]
    with Emulator() as emulator, ThreadPoolExecutor(at_once) as pool:
        os.environ.update(emulator.environment)

        def one(job: tuple[Kind, int]) -> Outcome:
            kind, number = job
            name = f"{KINDS.index(kind)}-{number}"
            run = f"gs://bucket/{name}" if kind.bucket else str(work / name)
            settings = (renew_s, silent_s)
            try:
                return two_starts.trial(
                    kind, run, work / f"scratch-{name}", seed + number, settings, dict(os.environ), longest_s
                )
            except Exception as error:
                return Outcome([f"{type(error).__name__}: {error}"], 0.0)

        with progress.bar("trials", len(jobs), shown=sys.stdout.isatty()) as advance:
            for (kind, _), outcome in zip(jobs, pool.map(one, jobs), strict=True):
                results[str(kind)].append(outcome)
                advance(1)
    if real:
        (work / "data").mkdir()
        write_data(work / "data")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(work / "compiled")
        found = [real_trial(work / "data", work / f"real-{number}") for number in range(real)]
        results["disk, one host, at one moment, phivision train"] = [Outcome(each, 0.0) for each in found]
    table = Table("two starts", "trials", "one trains, the other names it, no file touched", "answer after")
    rows = {}
    for name, outcomes in results.items():
        good, slowest = sum(not each.problems for each in outcomes), max(each.answer_s for each in outcomes)
        table.add_row(name, str(len(outcomes)), str(good), f"at most {slowest:.0f} s" if slowest else "")
        rows[name] = {"trials": len(outcomes), "good": good, "slowest_answer_s": round(slowest, 1)}
    problems = [f"{name}: {problem}" for name in results for each in results[name] for problem in each.problems]
    Console().print(table, *problems, sep="\n", markup=False)
    if out:
        before = json.loads(out.read_text()) if only and out.exists() else {"kinds": {}, "problems": []}
        rows = {**before["kinds"], **rows}
        problems += [problem for problem in before["problems"] if problem.split(": ")[0] not in results]
        given = {"trials": trials, "real": real, "longest_s": longest_s, "renew_s": renew_s, "silent_s": silent_s}
        given["real"] = max(real, before.get("real", 0))
        out.write_text(json.dumps({**given, "seed": seed, "kinds": rows, "problems": problems}, indent=1) + "\n")
    sys.exit(bool(problems))


if __name__ == "__main__":
    tyro.cli(main)
