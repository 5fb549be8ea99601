"""One side of a benchmark in a separate process, with JSON requests and answers over pipes, one a line.

The benchmark has a ``Peer``; the peer's script calls ``serve``. This module needs only Python 3.11.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class PeerStopped(SystemExit):
    """The peer's process ended before it answered."""


class Peer:
    """A running side; ``ask`` calls a method of it."""

    def __init__(self, python: Path, script: Path, threads: int, environment: Mapping[str, str]) -> None:
        if not python.is_file():
            raise SystemExit(
                f"--peer-python: {python} is no file; give the Python of an environment with torch and transformers 5 "
                "(the benchmark's docstring shows how to make one)"
            )
        own = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "PYTHONPATH": "", **environment}
        self._script = script.name
        self._process = subprocess.Popen(
            [str(python), str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **own},
        )

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Call the peer's method ``do``.

        Raises:
          PeerStopped: when the process has ended.
        """
        assert self._process.stdin and self._process.stdout
        try:
            print(json.dumps({"do": do, **arguments}), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise PeerStopped(f"{self._script} stopped ({do}); its output is above")
        return json.loads(line)

    def close(self) -> None:
        self._process.communicate()


@contextmanager
def peer_process(
    python: Path, script: Path, threads: int, environment: Mapping[str, str] | None = None
) -> Iterator[Peer]:
    """A running peer; ``environment`` is added to this process's own variables."""
    peer = Peer(python, script, threads, environment or {})
    try:
        yield peer
    finally:
        peer.close()


def serve(peer: Any) -> None:
    """Answer requests with ``peer``'s methods until there are no more."""
    answers, sys.stdout = sys.stdout, sys.stderr  # other output must not mix with the answers
    for line in sys.stdin:
        request = json.loads(line)
        answer = getattr(peer, request.pop("do"))(**request)
        print(json.dumps(answer), file=answers, flush=True)
