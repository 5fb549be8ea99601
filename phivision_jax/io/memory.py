"""A limit on the memory that decoding input of unknown origin may take."""

import contextlib
import functools
import os
import resource
import sys
import threading
from collections.abc import Iterator

LIMIT = 384 * 2**20
"""Bytes that a decoder may allocate, for anything that it makes of one item or one batch of rows."""
# By process; opening it at each use would take longer than all the rest.
_statm = functools.cache(lambda pid: os.open(f"/proc/{pid}/statm", os.O_RDONLY | os.O_CLOEXEC))
_one_at_a_time = threading.RLock()  # the limit is the process's


@contextlib.contextmanager
def limited_memory(extra: int = LIMIT) -> Iterator[None]:
    """Let this process allocate at most ``extra`` further bytes inside the block: beyond them, a MemoryError.

    A few kilobytes of compressed, run-length encoded or nested input can become gigabytes, and only its decoder knows.
    The system stops it here before memory runs out and the process is killed. Only Linux has such a limit; elsewhere
    this does nothing.
    """
    if sys.platform != "linux":
        yield
        return
    with _one_at_a_time:
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        used = int(os.pread(_statm(os.getpid()), 200, 0).split()[5]) * resource.getpagesize()
        most = used + extra if hard == resource.RLIM_INFINITY else min(used + extra, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (most, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
