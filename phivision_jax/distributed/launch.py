"""Start a run, and restart it after a preemption, a hang or a kill.

    python -m phivision_jax.distributed.launch --restarts 10 -- \\
        phivision train --config=configs/tiny.py --run=runs/a

A launcher starts one process. On a TPU slice, each host has a launcher; the processes find each other through JAX and
end together. The launcher restarts the process after a preemption, a hang, the death of another process or a death by
signal, but not after an error, which would only happen again. It passes SIGTERM or Ctrl-C on to the process, which
saves and ends; then the launcher ends too.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from typing import Annotated

import tyro
from tyro.conf import Positional, arg

from phivision_jax.distributed import heartbeat
from phivision_jax.distributed.heartbeat import HUNG, LAUNCHER, LOST, PREEMPTED, Heartbeat

SILENT_S = 60.0
"""Age of a heartbeat at which its process is killed: it hangs so badly that its own watchdog cannot end it."""
MEANINGS = {PREEMPTED: "asked to stop, and has saved", HUNG: "it hung", LOST: "another process was gone"}
"""Exit code that calls for a restart → its meaning."""
_POLL_S, _LOOK_S = 0.1, 2.0

Command = Annotated[Positional[tuple[str, ...]], arg(metavar="COMMAND...")]


def launch(command: list[str], run: str, restarts: int, grace_s: float) -> int:
    """Start, watch and restart the process of a run, to its end.

    Args:
      command: its command line.
      run: directory of the run, for its heartbeats, or ``gs://…``; empty: heartbeats are not watched.
      grace_s: seconds for the process to save after SIGTERM.

    Returns:
      The exit code.
    """
    signals: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: signals.append(number))
    while (code := _run_once(command, run, grace_s, signals)) and not signals:
        if code > 0 and code not in MEANINGS:
            log("giving up: the process ended with an error, which a restart would only repeat")
            break
        if not restarts:
            log("giving up: no restarts are left; --restarts allows more")
            break
        restarts -= 1
        log(f"starting again; {restarts} restarts are left after this one")
    return exit_code(code)


def _run_once(command: list[str], run: str, grace_s: float, signals: list[int]) -> int:
    """Start the process and wait for its end; returns its exit code, or minus the signal that it died of.

    Args:
      signals: those received so far; grows meanwhile.
    """
    environment = os.environ | {LAUNCHER: str(os.getpid())}
    # In a session of its own: Ctrl-C reaches the launcher only.
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    log(f"started process (pid {process.pid})")
    passed_on, deadline, look = 0, float("inf"), 0.0
    try:
        while process.poll() is None:
            if len(signals) > passed_on:  # the second time, at once
                passed_on = len(signals)
                wait = grace_s if passed_on == 1 else 0.0
                log(f"asked to stop: the run has {wait:.0f} s to save")
                process.send_signal(signal.SIGTERM)
                deadline = min(deadline, time.monotonic() + wait)
            if time.monotonic() > deadline:
                log(f"killing it after {grace_s:.0f} s without a save; --grace-s raises this limit")
                process.kill()
            if time.monotonic() > look:
                look, beat = time.monotonic() + _LOOK_S, last_beat(run, process.pid)
                if beat and beat["phase"] != "ended" and time.time() - beat["time"] > SILENT_S:
                    log(f"killing process (pid {process.pid}): {describe_beat(beat)}")
                    process.kill()
            time.sleep(_POLL_S)
    finally:
        process.kill()
        code = process.wait()
    if code:
        log(f"process (pid {process.pid}) {describe_end(code)}; {describe_beat(last_beat(run, process.pid))}")
    return code


def last_beat(run: str, pid: int) -> Heartbeat | None:
    """The last heartbeat of a process of this machine; a run's directory may also have those of other hosts."""
    beats = (beat for directory in heartbeat.local_directories(run) for beat in heartbeat.read(directory))
    return next((beat for beat in beats if (beat["pid"], beat["host"]) == (pid, socket.gethostname())), None)


def describe_beat(beat: Heartbeat | None) -> str:
    if beat is None:
        return "it gave no heartbeat"
    return f"its last heartbeat, {time.time() - beat['time']:.0f} s ago: {beat['phase']}, step {beat['step']}"


def describe_end(code: int) -> str:
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with code {code}" + (f" ({MEANINGS[code]})" if code in MEANINGS else "")


def exit_code(code: int) -> int:
    """The shell's exit code for ``subprocess``'s, which has minus the signal that a process died of."""
    return code if code >= 0 else 128 - code


def log(text: str) -> None:
    print(f"launch: {text}", file=sys.stderr, flush=True)


def run_of(command: list[str]) -> str:
    """The value of the command's --run; empty if it has none."""
    for word, following in zip(command, [*command[1:], ""], strict=True):
        if word == "--run" or word.startswith("--run="):
            return following if word == "--run" else word.removeprefix("--run=")
    return ""


def main(command: Command, /, restarts: int = 10, grace_s: float = 300.0) -> None:
    """Start a run, and restart it after a preemption, a hang or a kill.

    Args:
        command: Command line of the run, after "--": phivision train --config=… --run=…
        restarts: Maximum number of restarts.
        grace_s: Seconds that the process has to save after SIGTERM; then it is killed.
    """
    if not command or shutil.which(command[0]) is None:
        sys.exit(f"launch: give a command after --, as in -- phivision train …, not {' '.join(command) or 'nothing'}")
    sys.exit(launch(list(command), run_of(list(command)), restarts, grace_s))


if __name__ == "__main__":
    tyro.cli(main, prog="python -m phivision_jax.distributed.launch")
