"""Processes that share out the work of an import or a validation.

Each worker gets the shared arguments once, then job after job. It dies with its parent, is not disturbed by Ctrl-C
(the parent decides what becomes of it), and stops between two records when the parent stops. Workers are forked from a
server process that has imported what they need, so that ten of them cost little more memory than one.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver
from typing import Any

type Stopped = Callable[[], bool]
_AHEAD = 2  # Jobs handed out per worker: one at work, one waiting.

_shared: tuple[Any, ...] = ()  # In a worker: the shared arguments, and whether to stop.
_stopped: Stopped = lambda: False  # noqa: E731


class Stop(Exception):
    """A job gives up because ``stopped()`` is true; nobody waits for its result."""


def run[Job, Result](
    function: Callable[..., Result], shared: tuple[Any, ...], jobs: Iterable[Job], workers: int
) -> Generator[Result, None, None]:
    """``function(*shared, job, stopped)`` for each job, in whatever order they finish.

    Jobs are taken from the iterable as workers become free. Close the iterator (``contextlib.closing``) to stop early:
    the jobs at work see ``stopped()`` and should raise ``Stop``.

    Args:
      function: a function of a module; it and all arguments are pickled.
      workers: how many processes; 0: in this one, in order.

    Raises:
      ChildProcessError: when a worker dies.
      Exception: what a job raised; the others are stopped.
    """
    if workers == 0:
        for job in jobs:
            yield function(*shared, job, lambda: False)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__])
    # The server and its workers inherit the mask: a Ctrl-C while they are still importing must not hit them.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    stop = context.Event()
    pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(shared, stop))
    try:
        todo = iter(jobs)
        running: set[Future[Result]] = set()
        while True:
            with contextlib.suppress(StopIteration):
                while len(running) < _AHEAD * workers:
                    running.add(pool.submit(_call, function, next(todo)))
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    except BrokenProcessPool:
        raise ChildProcessError(
            "a worker process died (killed, or out of memory); fewer workers need less memory, and with 0 workers what "
            "kills them shows itself"
        ) from None
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _begin(shared: tuple[Any, ...], stop: Any) -> None:
    global _shared, _stopped
    _shared, _stopped = shared, stop.is_set
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Pillow's, about damage of which the reason that is given says all that matters.
    warnings.simplefilter("ignore")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """An orphan would wait for jobs for ever, or write beside the next import."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _call(function: Callable[..., Any], job: Any) -> Any:
    return function(*_shared, job, _stopped)
