"""Try again what may succeed later, waiting twice as long after each failure."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


class Backoff:
    """Counts failures in a row and waits between attempts.

        backoff = Backoff(attempts=5, first_wait_s=0.5)
        while True:
            try:
                return read()
            except OSError as error:
                backoff.wait(error)

    Args:
      attempts: failures in a row after which the last error is raised.
      first_wait_s: seconds to wait after the first failure.
      log: receives a line before each wait.
    """

    def __init__(self, attempts: int, first_wait_s: float, log: Callable[[str], Any] = lambda line: None) -> None:
        self._attempts, self._first_wait_s, self._log = attempts, first_wait_s, log
        self.failures = 0

    def wait(self, error: Exception, what: str = "") -> None:
        """Wait after a failure.

        Args:
          what: the work that failed, for the log.

        Raises:
          Exception: ``error``, when there are no attempts left.
        """
        self.failures += 1
        if self.failures >= self._attempts:
            raise error
        seconds = self._first_wait_s * 2 ** (self.failures - 1)
        self._log(f"{what}: {error}; trying again in {seconds:.1f} s".removeprefix(": "))
        time.sleep(seconds)

    def reset(self) -> None:
        """Count from zero again, after a success."""
        self.failures = 0


def retry[T](
    function: Callable[[], T],
    *,
    attempts: int,
    first_wait_s: float,
    transient: Callable[[Exception], bool] = lambda error: isinstance(error, OSError),
    log: Callable[[str], Any] = lambda line: None,
    what: str = "",
) -> T:
    """Call a function until it returns.

    Args:
      transient: whether another attempt may help after this error; others are raised at once.
      what: the work, for the log.

    Raises:
      Exception: of the last attempt.
    """
    backoff = Backoff(attempts, first_wait_s, log)
    while True:
        try:
            return function()
        except Exception as error:
            if not transient(error):
                raise
            backoff.wait(error, what)
