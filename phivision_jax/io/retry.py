"""Try again what may succeed later, waiting twice as long after each failure."""

import time
from collections.abc import Callable
from typing import Any


class Backoff:
    """Counts failures in a row and waits between attempts.

        backoff = Backoff(attempts=5, first_wait_s=0.5, log=print)
        while True:
            try:
                return read()
            except OSError as error:
                backoff.wait(error, "record 3")

    Args:
      attempts: failures in a row after which the last error is raised.
      first_wait_s: seconds to wait after the first failure.
      log: receives a line before each wait.
    """

    def __init__(self, attempts: int, first_wait_s: float, log: Callable[[str], Any]) -> None:
        self._attempts, self._first_wait_s, self._log = attempts, first_wait_s, log
        self.failures = 0

    def wait(self, error: Exception, what: str) -> None:
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
        self._log(f"{what}: {error}; trying again in {seconds:.1f} s")
        time.sleep(seconds)

    def reset(self) -> None:
        """Count from zero again, after a success."""
        self.failures = 0


def retry[T](function: Callable[[], T], attempts: int, first_wait_s: float, log: Callable[[str], Any], what: str) -> T:
    """Call a function until it raises no ``OSError``; arguments as for ``Backoff``.

    Raises:
      OSError: of the last attempt.
    """
    backoff = Backoff(attempts, first_wait_s, log)
    while True:
        try:
            return function()
        except OSError as error:
            backoff.wait(error, what)
