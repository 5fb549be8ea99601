"""Start a run as one or several processes of this machine, and restart it after a preemption, a hang or a kill.

    python -m phivision_jax.distributed.launch --restarts 10 -- \\
        python train.py --config=configs/tiny.py --run=runs/a

One process, the default, is for a machine with accelerators, or for each host of a TPU slice, where JAX finds the
others. Several processes on one machine are for CPUs and for tests.

When a process ends with anything but 0, the others cannot continue: they are stopped, and the launcher reports what
happened to which process. It restarts all after a preemption, a hang or a death by signal, and not after an error,
which would only happen again. SIGTERM or Ctrl-C to the launcher reaches all processes; they save and end, and so does
the launcher.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from types import FrameType
from typing import Annotated

import tyro

from phivision_jax.distributed import heartbeat
from phivision_jax.distributed.heartbeat import HUNG, LAUNCHER, LOST, PREEMPTED, Heartbeat

SETTLE_S = 3.0
"""Seconds for the others to report what they know, after one has died."""
SILENT_S = 60.0
"""Age of a heartbeat at which its process is killed: it hangs so badly that its own watchdog cannot end it."""
_POLL_S, _LOOK_S = 0.1, 2.0
_MEANINGS = {PREEMPTED: " (asked to stop, and has saved)", HUNG: " (it hung)", LOST: " (another one was gone)"}


@dataclasses.dataclass
class Child:
    """One process of one start."""

    number: int
    process: subprocess.Popen[bytes]
    code: int | None = None
    """Exit code, or minus the signal that it died of."""
    stopped: bool = False
    """True if the launcher killed it, because of something else."""

    def __str__(self) -> str:
        return f"process {self.number} (pid {self.process.pid})"

    def describe(self, run: str) -> str:
        """How it ended, and its last heartbeat."""
        assert self.code is not None
        how = f"ended with code {self.code}{_MEANINGS.get(self.code, '')}"
        if self.code < 0:
            how = f"was killed by {signal.Signals(-self.code).name}"
        return f"{self} {how}; {describe_beat(self.beat(run))}"

    def beat(self, run: str) -> Heartbeat | None:
        """Its last heartbeat. The directory also has those of other hosts and of earlier starts."""
        mine = (self.process.pid, socket.gethostname())
        beats = (beat for directory in heartbeat.local_directories(run) for beat in heartbeat.read(directory))
        return next((beat for beat in beats if (beat["pid"], beat["host"]) == mine), None)

    def cause_rank(self) -> int:
        """0 for a preemption, hang or kill; 1 for an error; 2 for what follows from others (JAX aborts a process whose
        peers are gone).
        """
        if self.code in (LOST, -signal.SIGABRT):
            return 2
        return 0 if self.code in (PREEMPTED, HUNG) or (self.code or 0) < 0 else 1

    def kill(self) -> None:
        if self.code is None and not self.stopped:
            self.stopped = True
            self.process.kill()
            self.process.wait()


def describe_beat(beat: Heartbeat | None) -> str:
    if beat is None:
        return "it gave no heartbeat"
    return f"its last heartbeat, {time.time() - beat['time']:.0f} s ago: {beat['phase']}, step {beat['step']}"


class Launcher:
    """Starts, watches and restarts the processes of a run.

    Args:
      command: the command line of each process.
      processes: number of processes.
      run: directory of the run, for its heartbeats, or ``gs://…``; empty: heartbeats are not watched.
      grace_s: seconds for the processes to save after SIGTERM.
    """

    def __init__(self, command: list[str], processes: int, run: str, grace_s: float) -> None:
        self.command, self.processes, self.run, self.grace_s = command, processes, run, grace_s
        self._signals = 0

    def launch(self, restarts: int) -> int:
        """Run the command to its end; returns the exit code."""
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            while (code := self._decide(self._run_once(), restarts)) is None:
                restarts -= 1
            return code
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1

    def _run_once(self) -> list[Child]:
        """Start all processes and wait until all have ended; returns them in the order in which they did."""
        passed_on = 0
        children = self._start()
        log(f"started {', '.join(map(str, children))}")
        deadline, look = float("inf"), 0.0
        ended: list[Child] = []
        try:
            while len(ended) < len(children):
                for child in children:
                    if child.code is not None or (code := child.process.poll()) is None:
                        continue
                    child.code = code
                    ended.append(child)
                    if not child.stopped:
                        if code:
                            log(child.describe(self.run))
                        deadline = min(deadline, time.monotonic() + self._patience(code))
                if self._signals > passed_on:  # the second time, at once
                    passed_on = self._signals
                    wait = self.grace_s if passed_on == 1 else 0.0
                    log(f"asked to stop: the run has {wait:.0f} s to save")
                    for child in children:
                        if child.code is None:
                            child.process.send_signal(signal.SIGTERM)
                    deadline = min(deadline, time.monotonic() + wait)
                if time.monotonic() > look:
                    look = time.monotonic() + _LOOK_S
                    self._kill_silent(children)
                if time.monotonic() > deadline:
                    break
                time.sleep(_POLL_S)
        finally:
            for child in children:
                child.kill()
        return [*ended, *(child for child in children if child.stopped)]

    def _patience(self, code: int) -> float:
        """Seconds for the others to end after one has."""
        return self.grace_s if code in (0, PREEMPTED) else SETTLE_S

    def _start(self) -> list[Child]:
        environment = os.environ | {LAUNCHER: str(os.getpid())}
        if self.processes > 1:  # a single one may be one of many, each with its launcher: JAX finds the others
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                address = f"127.0.0.1:{free.getsockname()[1]}"
            environment |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_COORDINATOR_BIND_ADDRESS": address}
            environment |= {"JAX_NUM_PROCESSES": str(self.processes)}
        children = []
        for number in range(self.processes):
            own = environment | ({"JAX_PROCESS_ID": str(number)} if self.processes > 1 else {})
            # In a session of its own: Ctrl-C reaches the launcher only.
            children.append(Child(number, subprocess.Popen(self.command, env=own, start_new_session=True)))
        return children

    def _kill_silent(self, children: list[Child]) -> None:
        """Kill processes whose heartbeat has stopped; they then count as dead by a signal."""
        for child in children:
            beat = child.beat(self.run) if child.code is None else None
            if beat and beat["phase"] != "ended" and time.time() - beat["time"] > SILENT_S:
                log(f"killing {child}: {describe_beat(beat)}")
                child.process.kill()

    def _decide(self, ended: list[Child], restarts: int) -> int | None:
        """The exit code after a start, or None to start again."""
        causes = sorted((child for child in ended if child.code and not child.stopped), key=Child.cause_rank)
        if not causes and not any(child.stopped for child in ended):
            return 0
        code = causes[0].code if causes else HUNG
        assert code is not None
        code = code if code > 0 else 128 - code
        if self._signals:
            if not causes:
                log(f"killed after {self.grace_s:.0f} s without having saved; --grace-s raises this limit")
            return code
        if causes and causes[0].cause_rank() == 1:
            log(f"giving up: {causes[0]} ended with an error, which a restart would only repeat")
            return code
        if not restarts:
            log("giving up: no restarts are left; --restarts allows more")
            return code
        log(f"starting again; {restarts - 1} restarts are left after this one")
        return None


def log(text: str) -> None:
    print(f"launch: {text}", file=sys.stderr, flush=True)


def run_of(command: list[str]) -> str:
    """The value of the command's --run; empty if it has none."""
    for word, following in zip(command, [*command[1:], ""], strict=True):
        if word == "--run" or word.startswith("--run="):
            return following if word == "--run" else word.removeprefix("--run=")
    return ""


def main(
    command: tyro.conf.Positional[tuple[str, ...]],
    /,
    processes: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 1,
    restarts: int = 10,
    grace_s: float = 300.0,
) -> None:
    """Start a run as processes of this machine, and restart it after a preemption, a hang or a kill.

    Args:
        command: Command line of each process, after "--": python train.py --config=… --run=…
        processes: Number of processes.
        restarts: Maximum number of restarts.
        grace_s: Seconds for the processes to save after SIGTERM.
    """
    if not command or processes < 1:
        sys.exit("launch: give a command after --, and at least one process")
    sys.exit(Launcher(list(command), processes, run_of(list(command)), grace_s).launch(restarts))


if __name__ == "__main__":
    tyro.cli(main, prog="python -m phivision_jax.distributed.launch")
