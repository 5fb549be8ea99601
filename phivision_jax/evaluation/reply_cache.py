"""Replies on disk, under the model, the request and its mode: no evaluation asks the same model the same thing twice.

A SQLite file that several processes may use at the same time. Entries are written some at a time; a kill loses those of
about a second, which are then asked again. A file that cannot be used is reported once, and replies are not cached.
"""

import contextlib
import hashlib
import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from phivision_jax.inference.requests import Reply, Timings
from phivision_jax.io.messages import Log
from phivision_jax.text.constants import PromptMode

_AT_ONCE, _AT_LEAST_EVERY_S = 64, 1.0
_BUSY_S = 30.0
"""Seconds to wait for another process that writes."""
_LEFT_OUT = ("ids", "logprobs")


def default_directory() -> Path:
    """The directory of the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "phivision_jax" / "replies"


class ReplyCache:
    """Replies by key. Safe to use from several threads.

    Args:
      directory: created if need be.
      log: receives a line when the cache cannot be used.
    """

    def __init__(self, directory: Path, log: Log = print) -> None:
        self._file, self._log = directory / "replies.sqlite", log
        self._lock, self._pending, self._written = threading.Lock(), dict[str, str](), time.monotonic()
        self._connection: sqlite3.Connection | None = None
        with self._reported():
            directory.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(self._file, timeout=_BUSY_S, check_same_thread=False)
            # A cache that a power cut damages is only a loss of time.
            self._connection.execute("PRAGMA synchronous = OFF")
            with self._connection as connection:
                connection.execute(
                    "CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT) WITHOUT ROWID"
                )

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            self._connection = None
            self._log(f"{self._file} cannot be used: {error}; replies are not cached")

    def get(self, key: str) -> Reply | None:
        """The reply under a key, without ids and log-probabilities."""
        with self._lock, self._reported():
            found = self._pending.get(key)
            if found is None and self._connection:
                row = self._connection.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
                found = row and row[0]
            return _from_json(found) if found else None
        return None

    def put(self, key: str, reply: Reply) -> None:
        """Keep a reply."""
        values = {name: value for name, value in vars(reply).items() if name not in _LEFT_OUT}
        text = json.dumps(values | {"timings": vars(reply.timings)})
        with self._lock:
            self._pending[key] = text
            if len(self._pending) >= _AT_ONCE or time.monotonic() - self._written > _AT_LEAST_EVERY_S:
                self._write()

    def _write(self) -> None:
        with self._reported():
            if self._connection:
                with self._connection as connection:
                    connection.executemany("INSERT OR REPLACE INTO replies VALUES (?, ?)", self._pending.items())
        self._pending.clear()
        self._written = time.monotonic()

    def close(self) -> None:
        """Write everything, and close the file."""
        with self._lock:
            self._write()
            if self._connection:
                self._connection.close()
                self._connection = None


def cache_key(model: str, mode: PromptMode, fingerprint: str) -> str:
    """The key of a request, of which ``task.fingerprint`` holds all but model and mode."""
    return hashlib.sha256("\n".join((model, mode, fingerprint)).encode()).hexdigest()


def _from_json(text: str) -> Reply | None:
    """A reply; None for what another version has written."""
    try:
        values: dict[str, Any] = json.loads(text)
        return Reply(**values | {"timings": Timings(**values["timings"]), **dict.fromkeys(_LEFT_OUT, ())})
    except (ValueError, KeyError, TypeError):
        return None
