"""Errors of writing that say which file could not be written: a full disk by itself names none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An ``OSError`` in here without a file's name gets this one's.

    Raises:
      OSError: of the same kind, as "[Errno 28] No space left on device: 'runs/mine/metrics.jsonl'".
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
