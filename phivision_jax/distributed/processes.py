"""The processes of one training: how they find each other, stop together, and fail together.

A step is one program over all devices, so no process can stop alone: the others would wait in its collectives for ever.

    told to stop   SIGTERM (preemption, maintenance) or Ctrl-C on any of them: all agree on a step (``Preemption``)
    an error       on any of them: the others are told the sentence and end as well (``propagate_failure``)
    a death        the others' collectives fail, or JAX misses its heartbeats and ends them (``initialize``)
    a hang         ``watchdog.py``

What a process ends with tells whoever started it (``launch.py``, a JobSet, a loop in a shell) whether to start again.
"""

from __future__ import annotations

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

DEAD_S = 20
"""Seconds without a heartbeat after which JAX takes a process for dead and ends the others. It sends them from a thread
of its own, whatever Python does."""

_FAILURE = "phivision/failure"
_LISTEN_S = 1.0
_TOLD_S = 10.0


def initialize() -> None:
    """Join the other processes of this training, if there are any; to be called before JAX touches a device.

    Where JAX knows the cluster (TPU slices on GCE and GKE, Slurm, Open MPI) everything is found out. Elsewhere the
    environment says it: JAX_COORDINATOR_ADDRESS (which JAX reads itself), JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    JAX_NUM_PROCESSES=1 says that this process is alone, whatever JAX would find.

    Raises:
      ValueError: when only some of the three are set.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    address, count, number = map(os.environ.get, names)
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
        raise ValueError(f"of {', '.join(names)}, {' and '.join(missing)} is not set; set all three or none")
    assert count and number
    jax.distributed.initialize(
        address,
        int(count),
        int(number),
        cluster_detection_method="deactivate",
        heartbeat_timeout_seconds=DEAD_S,
    )


def on_process_zero(what: str, function: Callable[[], Any]) -> None:
    """Have the first process do something to the run's directory; nobody goes on before it is done."""
    if jax.process_index() == 0:
        function()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def first_error(sentence: str | None) -> str | None:
    """What any process says, on all of them: the first one's by number. All must call it; a collective."""
    if jax.process_count() == 1:
        return sentence
    mine = np.frombuffer((sentence or "").encode()[:512].ljust(512, b"\0"), np.uint8)
    everyone = np.asarray(multihost_utils.process_allgather(mine))
    said = (row.tobytes().rstrip(b"\0").decode(errors="replace") for row in everyone)
    return next((sentence for sentence in said if sentence), None)


@contextlib.contextmanager
def propagate_failure(program: str, expected: tuple[type[Exception], ...]) -> Iterator[None]:
    """What ends one process ends all: an exception in here is told to the others, which print it and end as well.

    They may be anywhere, in a collective that will never come to its end too, so a thread of theirs listens and ends
    the process. All end with ``FAILED``; with ``LOST`` where one of them has not even heard of it, since its death is
    then what happened. JAX's own way out is not taken: it would wait for the others, and abort.

    Args:
      program: begins the sentence.
      expected: exceptions whose text is a sentence for the user; others are shown with their traceback.
    """
    client = global_state.client
    over = threading.Event()
    listener = threading.Thread(target=_listen, args=(client, over), daemon=True, name="failures of others")
    if client is not None:
        listener.start()
    try:
        yield
    except Exception as error:
        if client is None and not isinstance(error, expected):
            raise
        if client is None:
            sys.exit(f"{program}: {error}")
        over.set()
        listener.join()
        if isinstance(error, expected):
            print(f"{program}: {error}", file=sys.stderr)
        else:
            traceback.print_exc()
        sentence = (str(error).strip() or type(error).__name__).splitlines()[0]
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # told already by another one
            client.key_value_set(_FAILURE, f"process {global_state.process_id} has failed: {sentence}")
        _leave(client)
    finally:
        over.set()
        if client is not None:
            listener.join()


def _listen(client: Any, over: threading.Event) -> None:
    while not over.wait(_LISTEN_S):
        try:
            sentence = client.key_value_try_get(_FAILURE)
        except jax.errors.JaxRuntimeError:  # nobody has failed; without the store, JAX ends this process itself
            continue
        print(f"{sentence}; process {global_state.process_id} ends with it", file=sys.stderr)
        _leave(client)


def _leave(client: Any) -> NoReturn:
    """End when all have heard of the failure: the store is the first process's, and goes with it."""
    code = FAILED
    try:
        client.wait_at_barrier(_FAILURE, int(_TOLD_S * 1000))
    except jax.errors.JaxRuntimeError:
        code = LOST
        print("another process does not answer: it has died, and that is why", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def exit_on_signal() -> None:
    """Until ``Preemption`` takes over, SIGTERM and Ctrl-C end this process at once, and it may be started again.

    There is nothing to save yet. A handler of Python's is called when the main thread is back from whatever it does in
    C, and compiling may take minutes; so C tells a thread, through a pipe. (The handler does so too: an event loop that
    runs in the main thread may have put a pipe of its own there.) Of several processes ``jax.distributed`` has SIGTERM,
    and answers it later.
    """
    told, tell = os.pipe()
    os.set_blocking(tell, False)

    def end() -> None:
        os.read(told, 1)
        print("told to stop, with nothing to save", file=sys.stderr, flush=True)
        os._exit(PREEMPTED)

    def hear(number: int, frame: FrameType | None) -> None:
        os.write(tell, b"\0")

    threading.Thread(target=end, daemon=True, name="told to stop").start()
    signal.set_wakeup_fd(tell)
    signal.signal(signal.SIGINT, hear)
    if not jax.distributed.is_initialized():
        signal.signal(signal.SIGTERM, hear)


class Preemption:
    """Whether to stop, asked after each step; all processes get the same answer at the same step.

        with Preemption(first) as preemption:
            for ...:
                step += 1
                if preemption.reached(step): save; end with PREEMPTED

    Several processes: ``jax.distributed`` has taken SIGTERM when it was initialized and agrees on the step in the
    background, at no cost to the steps. A notice that came before training is answered at the first question. One
    process: a handler of ours. Ctrl-C counts as SIGTERM; a second one ends the process at once.

    Args:
      first: the step from which training begins.
    """

    _EARLY = 1  # What JAX agrees on when no process has asked yet: the step after none.

    def __init__(self, first: int) -> None:
        self._shared = jax.distributed.is_initialized()
        self._told = False
        if self._shared:
            self._told = multihost_utils.reached_preemption_sync_point(self._EARLY)
            # From here on JAX knows that the next step is first + 1.
            self._told |= multihost_utils.reached_preemption_sync_point(first)

    def __enter__(self) -> Self:
        self._before = {signal.SIGINT: signal.signal(signal.SIGINT, self._interrupted)}
        if not self._shared:
            self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._terminated)
        self._ends_at_once = signal.set_wakeup_fd(-1)
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._ends_at_once)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _terminated(self, number: int, frame: FrameType | None) -> None:
        self._told = True

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))
        print("stopping after this step, to save; Ctrl-C again quits at once", file=sys.stderr, flush=True)
        if self._shared:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self._told = True

    def reached(self, step: int) -> bool:
        """Whether to save ``step`` and stop. To be asked on every process after every step, in order."""
        if not self._shared or self._told:
            return self._told
        return multihost_utils.reached_preemption_sync_point(step)
