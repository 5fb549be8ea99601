"""Worker processes for a sequence of jobs.

Each worker receives the shared arguments once, then job after job. It ends with its parent, ignores Ctrl-C (the parent
decides), and can stop in the middle of a job. Workers are forked from a server process that has imported what they
need, so that ten of them take little more memory than one.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Collection, Generator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver
from typing import Any

type Stopped = Callable[[], bool]
_AHEAD = 2  # jobs submitted per worker: one in progress, one waiting

# In a worker: the shared arguments, and the question whether to stop.
_shared: tuple[Any, ...] = ()
_stopped: Stopped = lambda: False  # noqa: E731


class Stop(Exception):
    """Raised by a job that gives up because ``stopped()`` is true; its result is not needed."""


def run[Job, Result](
    function: Callable[..., Result], shared: tuple[Any, ...], jobs: Collection[Job], workers: int | None
) -> Generator[Result, None, None]:
    """Yield ``function(*shared, job, stopped)`` for each job, in the order in which they finish.

    Jobs are taken from the iterable as workers become free. Close the iterator (``contextlib.closing``) to stop early:
    jobs in progress should then see ``stopped()`` and raise ``Stop``.

    Args:
      function: a module's function; it and all arguments are pickled.
      workers: number of processes, at most one per job; 0: this process, in order; None: one per core.

    Raises:
      ChildProcessError: when a worker dies.
      Exception: of a job; the others are stopped.
    """
    workers = min(os.cpu_count() or 1 if workers is None else workers, len(jobs))
    if workers == 0:
        for job in jobs:
            yield function(*shared, job, lambda: False)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__])
    # The server and its workers inherit the mask: a Ctrl-C while they are still importing must not reach them.
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
        remedy = "fewer workers need less memory, and 0 workers show the cause"
        raise ChildProcessError(f"a worker process died (killed, or out of memory); {remedy}") from None
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _begin(shared: tuple[Any, ...], stop: Any) -> None:
    global _shared, _stopped
    _shared, _stopped = shared, stop.is_set
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """An orphan would wait for jobs forever, or write at the same time as the next run."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _call(function: Callable[..., Any], job: Any) -> Any:
    return function(*_shared, job, _stopped)
