"""Start a training as several processes of one machine, and start it again when it was stopped or has died.

    python -m phivision_jax.distributed.launch --processes 2 --restarts 10 -- \\
        python train.py --config=configs/tiny.py --run=runs/a

With ``--processes 1``, the default, it looks after one process: of a machine with accelerators, or on each host of a
TPU slice, where JAX finds the others. Several processes on one machine are for CPUs and for tests.

When a process ends otherwise than with 0 the rest cannot go on: it is stopped, and what happened to which process is
said. All are started again after a preemption, a hang or a death by signal, and not after an error, which would only
happen again. SIGTERM or Ctrl-C to the launcher reaches all processes; they save and end, and so does the launcher.
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
from phivision_jax.training import run_directory

SETTLE_S = 3.0
"""How long the others may take to say what they know, after one has died."""
SILENT_S = 60.0
"""A process whose heartbeat is older than this has hung so badly that its own watchdog cannot end it."""
_POLL_S, _LOOK_S = 0.1, 2.0


@dataclasses.dataclass
class Child:
    """One process of one start."""

    number: int
    process: subprocess.Popen[bytes]
    code: int | None = None
    """As ``subprocess`` has it: negative is the signal that it died of."""
    stopped: bool = False
    """By the launcher, for what happened elsewhere."""

    def poll(self) -> bool:
        """Whether it has ended just now."""
        if self.code is None:
            self.code = self.process.poll()
            return self.code is not None
        return False

    def describe(self, run: str) -> str:
        """What became of it, and its last heartbeat."""
        assert self.code is not None
        if self.code < 0:
            how = f"was killed by {signal.Signals(-self.code).name}"
        else:
            meanings = {PREEMPTED: "told to stop, and has saved", HUNG: "it hung", LOST: "another one was gone"}
            meaning = f" ({meanings[self.code]})" if self.code in meanings else ""
            how = f"ended with code {self.code}{meaning}"
        return f"process {self.number} (pid {self.process.pid}) {how}; {describe_beat(self.beat(run))}"

    def beat(self, run: str) -> Heartbeat | None:
        """Its last heartbeat; others in the directory are of other hosts, or of earlier starts."""
        mine = (self.process.pid, socket.gethostname())
        found = (beat for directory in run_directory.local_directories(run) for beat in heartbeat.read(directory))
        return next((beat for beat in found if (beat["pid"], beat["host"]) == mine), None)


def describe_beat(beat: Heartbeat | None) -> str:
    if beat is None:
        return "it gave no heartbeat"
    return f"its last heartbeat, {time.time() - beat['time']:.0f} s ago: {beat['phase']}, step {beat['step']}"


class Launcher:
    """See the module's description.

    Args:
      command: what each process runs.
      processes: how many.
      run: the training's directory, where the heartbeats are, or ``gs://…``; empty: they are not looked at.
      grace_s: how long processes may take to save after SIGTERM.
    """

    def __init__(self, command: list[str], processes: int, run: str, grace_s: float) -> None:
        self.command, self.processes, self.run, self.grace_s = command, processes, run, grace_s
        self._told = 0

    def launch(self, restarts: int) -> int:
        """Run the command to its end, and return the code to end with."""
        before = {number: signal.signal(number, self._tell) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            for left in range(restarts, -1, -1):
                code = self._once(left)
                if code is not None:
                    return code
            raise AssertionError("unreachable")
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _tell(self, number: int, frame: FrameType | None) -> None:
        self._told += 1

    def _once(self, restarts: int) -> int | None:
        """One start; the code to end with, or None: start again."""
        told = 0  # whoever was told during an earlier start has started nothing again
        children = self._start()
        pids = ", ".join(f"{child.number} (pid {child.process.pid})" for child in children)
        say(f"started process{'es' * (len(children) > 1)} {pids}")
        deadline, look = float("inf"), 0.0
        ended: list[Child] = []
        try:
            while len(ended) < len(children):
                for child in children:
                    if child.poll():
                        ended.append(child)
                        if not child.stopped:
                            if child.code:
                                say(child.describe(self.run))
                            wait = self.grace_s if child.code in (0, PREEMPTED) else SETTLE_S
                            deadline = min(deadline, time.monotonic() + wait)
                if self._told > told:  # a second time: at once
                    told, wait = self._told, self.grace_s if self._told == 1 else 0.0
                    say(f"told to stop: the training saves, {wait:.0f} s are given to it")
                    _signal(children, signal.SIGTERM)
                    deadline = min(deadline, time.monotonic() + wait)
                if time.monotonic() > deadline:
                    _kill(children)
                if time.monotonic() > look:
                    look = time.monotonic() + _LOOK_S
                    self._look_at_heartbeats(children)
                time.sleep(_POLL_S)
        finally:
            _kill(children)
        return self._judge(ended, restarts)

    def _start(self) -> list[Child]:
        environment = os.environ | {LAUNCHER: str(os.getpid())}
        if self.processes > 1:  # one alone may be one of many, each with its launcher: JAX finds out
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                address = f"127.0.0.1:{free.getsockname()[1]}"
            environment |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_COORDINATOR_BIND_ADDRESS": address}
            environment |= {"JAX_NUM_PROCESSES": str(self.processes)}
        return [
            # In a session of its own: Ctrl-C comes to the launcher alone.
            Child(
                number,
                subprocess.Popen(
                    self.command,
                    env=environment | ({"JAX_PROCESS_ID": str(number)} if self.processes > 1 else {}),
                    start_new_session=True,
                ),
            )
            for number in range(self.processes)
        ]

    def _look_at_heartbeats(self, children: list[Child]) -> None:
        """Kill a process that gives none any more; it then ends like any other that dies of a signal."""
        for child in children:
            beat = child.beat(self.run) if child.code is None and not child.stopped else None
            if beat and beat["phase"] != "ended" and time.time() - beat["time"] > SILENT_S:
                say(f"process {child.number} (pid {child.process.pid}) is killed: {describe_beat(beat)}")
                child.process.kill()

    def _judge(self, ended: list[Child], restarts: int) -> int | None:
        """What a start's end means: the code to end with, or None: start again."""
        causes = sorted((child for child in ended if child.code and not child.stopped), key=_rank)
        code = _exit_code(causes[0]) if causes else HUNG
        if not causes and all(child.code == 0 for child in ended):
            return 0
        if self._told:
            if not causes:
                say(f"killed after {self.grace_s:.0f} s without having saved; --grace-s allows more")
            return code
        if causes and _rank(causes[0]) == 1:
            say(f"giving up: process {causes[0].number} ended with an error, which starting again would only repeat")
            return code
        if not restarts:
            say("giving up: no restarts are left; --restarts allows more")
            return code
        say(f"starting again; {restarts - 1} restarts are left after this one")
        return None


def _rank(child: Child) -> int:
    """The lowest is what happened. The highest follow from others: JAX aborts those whose peers are gone."""
    if child.code in (LOST, -signal.SIGABRT):
        return 2
    return 0 if child.code in (PREEMPTED, HUNG) or (child.code or 0) < 0 else 1


def _exit_code(child: Child) -> int:
    assert child.code is not None
    return child.code if child.code > 0 else 128 - child.code


def _signal(children: list[Child], number: int) -> None:
    for child in children:
        if child.code is None:
            child.process.send_signal(number)


def _kill(children: list[Child]) -> None:
    for child in children:
        if child.code is None and not child.stopped:
            child.stopped = True
            child.process.kill()
            child.process.wait()


def say(text: str) -> None:
    print(f"launch: {text}", file=sys.stderr, flush=True)


def run_of(command: list[str]) -> str:
    """The directory that the command's --run names; empty: none."""
    for i, word in enumerate(command):
        if word.startswith("--run="):
            return word.removeprefix("--run=")
        if word == "--run" and i + 1 < len(command):
            return command[i + 1]
    return ""


def main(
    command: tyro.conf.Positional[tuple[str, ...]],
    /,
    processes: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 1,
    restarts: int = 10,
    grace_s: float = 300.0,
) -> None:
    """Start a training as several processes of this machine, and start it again when it was stopped or has died.

    Args:
        command: What each process runs, after "--": python train.py --config=… --run=…
        processes: How many.
        restarts: How often it is started again.
        grace_s: How long the processes may take to save once they have been told to stop.
    """
    if not command or processes < 1:
        sys.exit("launch: give a command after --, and at least one process")
    sys.exit(Launcher(list(command), processes, run_of(list(command)), grace_s).launch(restarts))


if __name__ == "__main__":
    tyro.cli(main, prog="python -m phivision_jax.distributed.launch")
