"""Trials of two starts of one run, in real processes: exactly one may train, and the other must touch nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from phivision_jax.io import storage
from tests.support.paths import ROOT, SUPPORT

PATIENCE_S = 300.0
CLOCK_S = 600.0
"""Seconds by which the clocks of two hosts differ."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """One situation in which a run is started twice."""

    bucket: bool = False
    two_hosts: bool = False
    apart: bool = False
    """The second start comes 0.1 to 60 s after the first; else at the same moment."""
    killed: bool = False
    """An owner before both was killed, on the host of the first of the two."""
    elsewhere: bool = False
    """It ran on a third host: both wait until it counts as gone."""
    clocks_s: float = 0.0

    def __str__(self) -> str:
        parts = ["bucket" if self.bucket else "disk", "two hosts" if self.two_hosts else "one host"]
        parts += ["0.1 to 60 s apart" if self.apart else "at one moment"]
        parts += [f"after a kill{' on a third' * self.elsewhere}"] * self.killed
        return ", ".join(parts + [f"clocks {self.clocks_s:+.0f} s"] * bool(self.clocks_s))


KINDS = [
    Kind(bucket=bucket, two_hosts=bool(clock), apart=apart, clocks_s=clock)
    for bucket in (False, True)
    for clock in (0.0, CLOCK_S, -CLOCK_S)
    for apart in (False, True)
] + [
    Kind(bucket=bucket, two_hosts=two, killed=True, elsewhere=elsewhere)
    for bucket in (False, True)
    for two, elsewhere in ((False, False), (True, False), (True, True))
]


@dataclasses.dataclass
class Outcome:
    """What a trial found; every problem is a sentence."""

    problems: list[str]
    answer_s: float
    """Seconds from the later start until the one that may not train had ended."""


class Start:
    """One start, in a process of its own."""

    def __init__(self, run: str, host: str, clock_s: float, settings: tuple[float, float], env: dict[str, str]) -> None:
        words = [sys.executable, str(SUPPORT / "started.py"), run, host, str(clock_s), *map(str, settings)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(words, cwd=ROOT, env=env | {"PYTHONPATH": str(ROOT)}, text=True, **pipes)  # type: ignore[call-overload]
        os.set_blocking(self.process.stdout.fileno(), False)
        self._printed = ""

    @property
    def owner(self) -> str:
        """Process id and host, as printed once it trains."""
        with contextlib.suppress(BlockingIOError, ValueError):  # nothing new, or closed
            self._printed += os.read(self.process.stdout.fileno(), 1000).decode()
        return " on ".join(self._printed.split()[1:3])

    def finish(self) -> str:
        """End training; returns what it printed on standard error."""
        os.set_blocking(self.process.stdout.fileno(), True)
        output, errors = self.process.communicate(timeout=PATIENCE_S)
        self._printed += output
        return errors

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.02)


def trial(
    kind: Kind, run: str, scratch: Path, seed: int, settings: tuple[float, float], environment: dict[str, str],
    longest_s: float = 60.0,
) -> Outcome:  # fmt: skip
    """Start a run twice and look at what both have done.

    Args:
      run: a new directory, or ``gs://…``.
      scratch: for local copies.
      settings: seconds between renewals, and of silence.
      environment: of the processes.
      longest_s: between two starts that are apart.
    """
    rng = random.Random(seed)
    hosts = [("host-a", 0.0), ("host-b", kind.clocks_s)] if kind.two_hosts else [("", 0.0), ("", 0.0)]
    hosts.append(("host-c", 0.0) if kind.elsewhere else hosts[0])

    def start(number: int) -> Start:
        return Start(run, *hosts[number], settings, environment | {storage.SCRATCH: str(scratch / hosts[number][0])})

    starts: list[Start] = []
    try:
        if kind.killed:
            before = start(2)
            starts.append(before)
            until(lambda: before.owner and steps(run), "the first owner trains")
            before.kill()
            starts.clear()
        starts.append(start(0))
        if kind.apart:
            until(lambda: starts[0].owner, "the first start trains")
            time.sleep(0.1 * (longest_s / 0.1) ** rng.random())
        kept = contents(run) if kind.apart else {}
        began = time.monotonic()
        starts.append(start(1))
        until(lambda: any(s.process.poll() is not None for s in starts), "one start is refused")
        answer_s = time.monotonic() - began
        until(lambda: any(s.owner and s.process.poll() is None for s in starts), "one start trains")
        time.sleep(0.5)
        return Outcome(problems(kind, run, starts, kept), answer_s)
    finally:
        for other in starts:
            other.kill()


def problems(kind: Kind, run: str, starts: list[Start], kept: dict[str, bytes]) -> list[str]:
    """What is wrong, once one of two starts has ended."""
    found = []
    training = [s for s in starts if s.process.poll() is None]
    refused = [s for s in starts if s.process.poll() is not None]
    if len(training) != 1 or (kind.apart and training != starts[:1]):
        return [f"{len(training)} of the starts train: " + " ".join(s.finish() for s in refused)]
    owner = training[0].owner
    message = refused[0].finish()
    if refused[0].owner or refused[0].process.returncode != 1:
        found.append(f"the other trained or ended with {refused[0].process.returncode}: {message}")
    if f"is being trained already, by process {owner} since 2" not in message or "Traceback" in message:
        found.append(f"the other did not name {owner}: {message}")
    errors = training[0].finish()
    if training[0].process.returncode:
        found.append(f"the one that trained ended with {training[0].process.returncode}: {errors}")
    pid, now = int(owner.split()[0]), contents(run)
    lines = [json.loads(line) for line in now["metrics.jsonl"].splitlines()]
    own = [line["step"] for line in lines if line["by"] == pid]
    if own != list(range(1, len(own) + 1)) or (len(own) < len(lines) and not kind.killed):
        found.append(f"metrics.jsonl holds {lines}")
    wrong = [
        name for name, content in now.items() if name.split("/")[0] in ("assets", "plan") and pid_of(content) != pid
    ]
    saved = {name for name, content in now.items() if name.startswith("checkpoints/") and int(content) == pid}
    missing = {f"checkpoints/{step}.txt" for step in own if step % 5 == 0} - saved
    gone = [
        name for name, content in kept.items() if name.split("/")[0] not in ("owner", "heartbeat")
        and not now.get(name, b"").startswith(content)
    ]  # fmt: skip
    if wrong or missing or gone:
        found.append(f"files were touched: {wrong}, {missing}, {gone}")
    return found


def contents(run: str) -> dict[str, bytes]:
    place = storage.location(run)
    while True:
        with contextlib.suppress(FileNotFoundError):  # a temporary file was renamed between its listing and its reading
            return {name: (place / name).read_bytes() for name in storage.files(place) if "/." not in f"/{name}"}


def steps(run: str) -> int:
    return len([name for name in storage.files(storage.location(run)) if name.startswith("checkpoints/")])


def pid_of(content: bytes) -> int:
    return int(content.split()[-1])
