"""A run as several processes of this machine, which are stopped and restarted together.

    python -m tests.support.launch_many --processes 2 --restarts 10 -- python train.py --config=… --run=runs/a

On a TPU slice each host has a launcher of its own (``phivision_jax/distributed/launch.py``). When a process ends with
anything but 0, the others cannot continue: they are stopped. The launcher restarts all after a preemption, a hang or a
death by signal, and not after an error.
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

import tyro

from phivision_jax.distributed.heartbeat import HUNG, LAUNCHER, LOST, PREEMPTED
from phivision_jax.distributed.launch import describe_beat, describe_end, exit_code, last_beat, log, run_of

SETTLE_S = 3.0
"""Seconds for the others to report what they know, after one has died."""
_POLL_S = 0.1


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


class Launcher:
    """Starts, watches and restarts the processes of a run.

    Args:
      command: the command line of each process.
      processes: number of processes.
      grace_s: seconds for the processes to save after SIGTERM.
    """

    def __init__(self, command: list[str], processes: int, grace_s: float) -> None:
        self.command, self.processes, self.run, self.grace_s = command, processes, run_of(command), grace_s
        self._signals = 0

    def launch(self, restarts: int) -> int:
        """Run the command to its end; returns the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        while (code := self._decide(self._run_once(), restarts)) is None:
            restarts -= 1
        return code

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1

    def _run_once(self) -> list[Child]:
        """Start all processes and wait until all have ended; returns them in the order in which they did."""
        passed_on = 0
        children = self._start()
        log(f"started {', '.join(map(str, children))}")
        deadline = float("inf")
        ended: list[Child] = []
        try:
            while len(ended) < len(children) and time.monotonic() < deadline:
                for child in children:
                    if child.code is not None or (code := child.process.poll()) is None:
                        continue
                    child.code = code
                    ended.append(child)
                    if code:
                        beat = describe_beat(last_beat(self.run, child.process.pid))
                        log(f"{child} {describe_end(code)}; {beat}")
                    wait = self.grace_s if code in (0, PREEMPTED) else SETTLE_S
                    deadline = min(deadline, time.monotonic() + wait)
                if self._signals > passed_on:  # the second time, at once
                    passed_on = self._signals
                    wait = self.grace_s if passed_on == 1 else 0.0
                    log(f"asked to stop: the run has {wait:.0f} s to save")
                    for child in children:
                        if child.code is None:
                            child.process.send_signal(signal.SIGTERM)
                    deadline = min(deadline, time.monotonic() + wait)
                time.sleep(_POLL_S)
        finally:
            for child in children:
                child.kill()
        return [*ended, *(child for child in children if child.stopped)]

    def _start(self) -> list[Child]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        environment = os.environ | {"JAX_COORDINATOR_ADDRESS": address, "JAX_COORDINATOR_BIND_ADDRESS": address}
        environment |= {"JAX_NUM_PROCESSES": str(self.processes), LAUNCHER: str(os.getpid())}
        children = []
        for number in range(self.processes):
            own = environment | {"JAX_PROCESS_ID": str(number)}
            # In a session of its own: Ctrl-C reaches the launcher only.
            children.append(Child(number, subprocess.Popen(self.command, env=own, start_new_session=True)))
        return children

    def _decide(self, ended: list[Child], restarts: int) -> int | None:
        """The exit code after a start, or None to start again."""
        causes = sorted((child for child in ended if child.code and not child.stopped), key=Child.cause_rank)
        if not causes and not any(child.stopped for child in ended):
            return 0
        code = exit_code(causes[0].code or 0) if causes else HUNG
        if self._signals:
            if not causes:
                log(f"killed after {self.grace_s:.0f} s without a save")
            return code
        if causes and causes[0].cause_rank() == 1:
            log(f"giving up: {causes[0]} ended with an error, which a restart would only repeat")
            return code
        if not restarts:
            log("giving up: no restarts are left")
            return code
        log(f"starting again; {restarts - 1} restarts are left after this one")
        return None


def main(
    command: tyro.conf.Positional[tuple[str, ...]], /, processes: int = 2, restarts: int = 10, grace_s: float = 300.0
) -> None:
    """Start a run as several processes of this machine, which are stopped and restarted together.

    Args:
        command: Command line of each process, after "--".
        processes: Number of processes.
        restarts: Maximum number of restarts.
        grace_s: Seconds for the processes to save after SIGTERM.
    """
    sys.exit(Launcher(list(command), processes, grace_s).launch(restarts))


if __name__ == "__main__":
    tyro.cli(main, prog="python -m tests.support.launch_many")
