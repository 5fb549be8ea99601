"""The client of ``math_server``: equality of expressions in bounded time."""

import atexit
import json
import os
import re
import select
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

from phivision_jax.evaluation.scoring.math_server import DIFFERENT, EQUAL, LATE, READY

COMPUTING = 0.08
"""Seconds of computation after which the server gives up a comparison. Ordinary ones take 0.003, or 0.03 if the parser
has not seen their form yet."""
WAITING = 10.0
"""Seconds after which a server that does not answer is given up. Only a busy machine takes longer than ``COMPUTING``: a
score must not depend on what else it does."""
STARTING = 60.0
"""Seconds in which the server must have started."""
LONGEST_EXPRESSION = 200
"""Characters of an expression that is compared."""
DEEPEST_NESTING = 8
_TOO_LARGE = re.compile(
    r"(?:\^|\*\*)(?:\{[^{}]*|[(-]*\d*)(?:\^|\*\*)"  # an exponent with an exponent
    r"|(?:\^|\*\*)[{(\s+-]*\d{4,}"
    r"|\d{4,}\s*!|![)}\s]*[!^]"
)


def expressions_equal(reference: str, answer: str) -> bool | None:
    """True for mathematical expressions that are equal, False if not, None if that is not known in time.

    Expressions that are long, deeply nested or have large exponents are not compared: None.
    """
    if not (_harmless(reference) and _harmless(answer)):
        return None
    return _worker.equal(reference, answer)


def _harmless(text: str) -> bool:
    if len(text) > LONGEST_EXPRESSION or _TOO_LARGE.search(text):
        return False
    depth = 0
    for character in text:
        depth += (character in "{[(") - (character in "}])")
        if depth > DEEPEST_NESTING:
            return False
    return True


class MathWorker:
    """A server process that starts with the first comparison, and again if it has ended. Threads take turns."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owed = 0
        """Replies of the server that nobody waits for any more."""

    def equal(self, reference: str, answer: str) -> bool | None:
        """True or False as the server finds, None if it is late or has ended."""
        request = json.dumps([reference, answer]).encode()
        with self._lock:
            try:
                process = self._process or self._start()
                end = time.monotonic() + WAITING
                assert process.stdin and process.stdout
                process.stdin.write(struct.pack("<I", len(request)) + request)
                self._owed += 1
                while self._owed > 1:  # late replies to earlier requests
                    if self._reply(process, end) is None:
                        return None
                return {EQUAL: True, DIFFERENT: False}.get(self._reply(process, end) or LATE)
            except (BrokenPipeError, EOFError):
                self.close()
                return None

    def close(self) -> None:
        """End the server."""
        if self._process:
            self._process.kill()
            self._process.communicate()
        self._process, self._owed = None, 0

    def _start(self) -> subprocess.Popen[bytes]:
        server = Path(__file__).with_name("math_server.py")
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(server), str(COMPUTING)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
        )
        self._owed = 1
        if self._reply(self._process, time.monotonic() + STARTING) != READY:
            self.close()
            raise RuntimeError(f"no comparison of expressions: {server} did not start")
        return self._process

    def _reply(self, process: subprocess.Popen[bytes], end: float) -> bytes | None:
        """The next reply of the server, None if there is none until ``end``."""
        assert process.stdout
        if not select.select([process.stdout], [], [], max(0.0, end - time.monotonic()))[0]:
            return None
        reply = process.stdout.read(1)
        if not reply:
            raise EOFError
        self._owed -= 1
        return reply


_worker = MathWorker()
atexit.register(_worker.close)


def _forget() -> None:
    """In a forked process, leave the server to the process that started it."""
    global _worker
    _worker = MathWorker()


os.register_at_fork(after_in_child=_forget)
