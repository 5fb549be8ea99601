"""The processes of one run: how they find each other, stop together, and fail together.

A step is one program over all devices, so no process can stop alone: the others would wait in its collectives forever.

    asked to stop  SIGTERM (preemption, maintenance) or Ctrl-C on any process: all agree on a step (``Preemption``)
    an error       on any process: the others receive its message and end too (``propagate_failure``)
    a death        collectives of the others fail, or JAX misses its heartbeats and ends them (``initialize``)
    a hang         ``heartbeat.py``

Exit codes (``heartbeat.py``) let a launcher (``launch.py``, a JobSet, a shell loop) decide whether to start again.
"""

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn, Self

import jax
import numpy as np
from jax._src.distributed import global_state  # the key-value store that Orbax uses too; JAX exports it nowhere
from jax.experimental import multihost_utils

from phivision_jax.distributed.heartbeat import FAILED, LOST, PREEMPTED
from phivision_jax.io.messages import printable

DEAD_S = 20
"""Seconds without a heartbeat after which JAX considers a process dead and ends the others; a native thread sends them,
whatever Python does."""

_FAILURE = "phivision/failure"
_LISTEN_S = 1.0
_HEARD_S = 10.0


def initialize() -> None:
    """Join the other processes of this run, if any; call it before JAX touches a device.

    JAX finds them on clusters that it knows (TPU slices on GCE and GKE, Slurm, Open MPI). Elsewhere three environment
    variables describe them: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. JAX_NUM_PROCESSES=1 keeps a
    process alone, whatever JAX would find.

    Raises:
      ValueError: when only some of the three are set.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    address, count, number = (os.environ.get(name, "") for name in names)
    if count == "1":
        return
    if not (address or count or number):
        try:
            jax.distributed.initialize(heartbeat_timeout_seconds=DEAD_S)
        except ValueError as error:
            if "coordinator_address should be defined" not in str(error):
                raise
        return
    if missing := [name for name in names if not os.environ.get(name)]:
        raise ValueError(f"set all of {', '.join(names)} or none; missing: {', '.join(missing)}")
    jax.distributed.initialize(
        address, int(count), int(number), cluster_detection_method="deactivate", heartbeat_timeout_seconds=DEAD_S
    )


def on_process_zero(name: str, function: Callable[[], Any]) -> None:
    """Run a function on the first process; no process returns before it is done. A collective."""
    if jax.process_index() == 0:
        function()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def first_error(message: str | None) -> str | None:
    """All-gather an optional message; return the lowest rank's. A collective."""
    if jax.process_count() == 1:
        return message
    mine = np.frombuffer((message or "").encode()[:512].ljust(512, b"\0"), np.uint8)
    everyone = np.asarray(multihost_utils.process_allgather(mine))
    messages = (row.tobytes().rstrip(b"\0").decode(errors="replace") for row in everyone)
    return next((message for message in messages if message), None)


@contextlib.contextmanager
def propagate_failure(program: str, expected: tuple[type[Exception], ...]) -> Iterator[None]:
    """Broadcast an exception to all processes; each prints it and exits. A single process just raises it.

    The others may be inside a collective that will never finish, so a thread of theirs listens and ends the process.
    All exit with ``FAILED``, or with ``LOST`` where one does not confirm: its death is then the cause. JAX's own
    shutdown is avoided, since it would wait for the others and abort.

    Args:
      program: prefix of the message.
      expected: exceptions whose message is for the user; others are printed with their traceback.
    """
    client = global_state.client
    if client is None:
        yield
        return
    over = threading.Event()
    listener = threading.Thread(target=_listen, args=(client, over), daemon=True, name="failures of others")
    listener.start()
    try:
        yield
    except Exception as error:
        over.set()
        listener.join()
        if isinstance(error, expected):
            print(printable(f"{program}: {error}"), file=sys.stderr)
        else:
            traceback.print_exc()
        message = (str(error).strip() or type(error).__name__).splitlines()[0]
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process has reported a failure already
            client.key_value_set(_FAILURE, f"process {global_state.process_id} has failed: {message}")
        _exit_together(client)
    finally:
        over.set()
        listener.join()


def _listen(client: Any, over: threading.Event) -> None:
    while not over.wait(_LISTEN_S):
        try:
            message = client.key_value_try_get(_FAILURE)
        except jax.errors.JaxRuntimeError:  # no failure; if the store itself is gone, JAX ends this process
            continue
        print(printable(message) + f"; process {global_state.process_id} ends with it", file=sys.stderr)
        _exit_together(client)


def _exit_together(client: Any) -> NoReturn:
    """Exit once all processes know of the failure: the store belongs to the first process and ends with it."""
    code = FAILED
    try:
        client.wait_at_barrier(_FAILURE, int(_HEARD_S * 1000))
    except jax.errors.JaxRuntimeError:
        code = LOST
        print("another process does not answer: its death is the cause", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def exit_on_signal() -> None:
    """Let SIGTERM and Ctrl-C end this process at once with ``PREEMPTED``, until ``Preemption`` takes over.

    There is nothing to save yet. Python runs a signal handler only when the main thread returns from native code, and
    compiling may take minutes; so the signal wakes a thread through a pipe (``signal.set_wakeup_fd``). The handler
    writes to the pipe too, in case an event loop of the main thread has replaced the wakeup file descriptor. With
    several processes ``jax.distributed`` owns SIGTERM, and it is answered after the first step.
    """
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)

    def exit_at_once() -> None:
        os.read(read_end, 1)
        print("asked to stop, with nothing to save", file=sys.stderr, flush=True)
        os._exit(PREEMPTED)

    def wake(number: int, frame: FrameType | None) -> None:
        os.write(write_end, b"\0")

    threading.Thread(target=exit_at_once, daemon=True, name="exit on signal").start()
    signal.set_wakeup_fd(write_end)
    signal.signal(signal.SIGINT, wake)
    if not jax.distributed.is_initialized():
        signal.signal(signal.SIGTERM, wake)


class Preemption:
    """Decides after each step whether to stop; all processes get the same answer at the same step.

        with Preemption(first) as preemption:
            for ...:
                step += 1
                if preemption.reached(step): save; exit with PREEMPTED

    Several processes: ``jax.distributed`` handles SIGTERM and agrees on the step in the background, at no cost to the
    steps; a notice from before training is answered at the first call. One process: a handler here. Ctrl-C counts as
    SIGTERM; a second one ends the process at once.

    Args:
      first: the step that training resumes from.
    """

    def __init__(self, first: int) -> None:
        self._shared = jax.distributed.is_initialized()
        self._stop = False
        if self._shared:
            # The step that JAX agrees on when no process has asked yet is the one after none.
            self._stop = multihost_utils.reached_preemption_sync_point(1)
            # From here on JAX knows that the next step is first + 1.
            self._stop |= multihost_utils.reached_preemption_sync_point(first)

    def __enter__(self) -> Self:
        self._before = {signal.SIGINT: signal.signal(signal.SIGINT, self._on_interrupt)}
        if not self._shared:
            self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._on_terminate)
        self._wakeup = signal.set_wakeup_fd(-1)
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_terminate(self, number: int, frame: FrameType | None) -> None:
        self._stop = True

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))
        print("stopping after this step, to save; Ctrl-C again quits at once", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)

    def reached(self, step: int) -> bool:
        """True if training is to save ``step`` and stop. Call it on every process after every step, in order."""
        if not self._shared or self._stop:
            return self._stop
        return multihost_utils.reached_preemption_sync_point(step)
