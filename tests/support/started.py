"""A start of a run that writes files like a training run, until its standard input is closed; it needs no JAX.

    python started.py RUN HOST CLOCK RENEW_S SILENT_S

HOST is the machine on which it takes itself to be (empty: this one), CLOCK the seconds by which its clock is ahead.
Prints "trains" with its process id and host once it owns the run; if it may not train, it exits with 1 and a message.
"""

from __future__ import annotations

import datetime
import json
import os
import select
import socket
import sys
import time

from phivision_jax.distributed import heartbeat, run_lock
from phivision_jax.training import run_directory
from phivision_jax.training.run_directory import RunDirectory

STEP_S, EVERY = 0.05, 5


def main(run: str, host: str, clock: str, renew_s: str, silent_s: str) -> None:
    be_elsewhere(host, float(clock))
    run_lock.RENEW_S, run_lock.SILENT_S = float(renew_s), float(silent_s)
    run_directory.PUSH_S = 1.0
    directory = RunDirectory(run, log=lambda line: print(line, file=sys.stderr, flush=True))
    try:
        with directory.lock, directory:
            print("trains", os.getpid(), socket.gethostname(), flush=True)
            train(directory)
    except ValueError as error:
        sys.exit(f"started.py: {error}")


def be_elsewhere(host: str, ahead_s: float) -> None:
    """Another host's name and ids, and a clock that is ahead."""
    real, now = time.time, datetime.datetime

    class Clock(now):  # type: ignore[valid-type,misc]
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
            return now.now(tz) + datetime.timedelta(seconds=ahead_s)

    time.time, datetime.datetime = lambda: real() + ahead_s, Clock  # type: ignore[misc]
    if host:
        socket.gethostname, run_lock.machine = lambda: host, lambda: f"{host} its-boot pid:[1]"


def train(directory: RunDirectory) -> None:
    """Make the files of a run's start, then a line per step and a checkpoint every few steps."""
    for name in ("assets/tokenizer.json", "plan/plan.json"):
        (directory.local / name).parent.mkdir(exist_ok=True)
        (directory.local / name).write_text(f"of {os.getpid()}")
    step, metrics = 0, directory.local / "metrics.jsonl"
    while not select.select([sys.stdin], [], [], STEP_S)[0]:
        step += 1
        with metrics.open("a") as file:
            file.write(json.dumps({"step": step, "by": os.getpid()}) + "\n")
        beat = heartbeat.Heartbeat(process=0, phase="step", step=step, time=time.time(), pid=os.getpid(), host="h")
        heartbeat.write(directory.local, beat)
        if step % EVERY == 0:
            directory.lock.check()
            directory.push()
            if step == EVERY:
                directory.url.joinpath("checkpoints").mkdir(exist_ok=True)
            directory.url.joinpath("checkpoints", f"{step}.txt").write_text(str(os.getpid()))


if __name__ == "__main__":
    main(*sys.argv[1:])
