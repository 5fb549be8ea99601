"""Traces of ``jax.profiler``: of the steps that a configuration names, and of the steps after a slow one.

Every process writes its files into ``run/profile/<first step>``; ``xprof`` shows them together. A trace begins and ends
while no step is running, so that it contains complete steps.
"""

import re
import statistics
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path

import jax

DIRECTORY = "profile"
WINDOW = 50
"""Number of recent steps whose median decides what is slow."""
MIN_STEPS = 10
"""Steps before one can be slow; the first ones often are."""
AFTER_SLOW = 3
"""Steps that are traced after a slow one."""


def parse_steps(text: str) -> range:
    """``"100:103"`` → steps 100, 101 and 102; empty → none. A run's first step is 1.

    Raises:
      ValueError: for anything else.
    """
    found = re.fullmatch(r"(\d{1,12}):(\d{1,12})", text)
    steps = range(int(found[1]), int(found[2])) if found else range(0)
    if text and (not steps or steps[0] < 1):
        raise ValueError(f"profile is {text!r}; give FIRST:END, like '100:103' for steps 100, 101 and 102, or nothing")
    return steps


class Profiler:
    """Start and stop traces between steps.

    Args:
      run: the run's directory.
      profile: steps to trace, see ``parse_steps``.
      slow_step: trace the ``AFTER_SLOW`` steps after one that takes this many times the median of ``WINDOW`` steps, the
        first time that happens; 0: never.
      log: receives where a trace is and how to open it.

    Raises:
      ValueError: for a malformed ``profile``; for a ``slow_step`` at which ordinary steps would be slow.
    """

    def __init__(self, run: Path, profile: str = "", slow_step: float = 0, log: Callable[[str], None] = print) -> None:
        if slow_step and not slow_step > 1:
            raise ValueError(f"slow_step is {slow_step}; give a multiple of the median step above 1, or 0 for never")
        self._directory, self._log = run / DIRECTORY, log
        self._profile, self._slow_step = parse_steps(profile), slow_step
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._traced = range(0)

    def before(self, step: int, drain: Callable[[], None], durations: Iterable[float] = ()) -> None:
        """Call before each step is dispatched.

        Args:
          step: the next step, from 1.
          drain: waits until no step is running; called where a trace begins or ends.
          durations: seconds of the steps that finished since the last call.
        """
        slow = [found for seconds in durations if (found := self._slow(seconds))]
        if step in self._traced:
            return
        self.close(drain)
        if step in self._profile:
            self._traced = range(step, self._profile.stop)
        elif slow:
            self._log(f"{slow[-1]}: tracing the next {AFTER_SLOW}")
            self._slow_step = 0.0
            self._traced = range(step, step + AFTER_SLOW)
        if self._traced:
            drain()
            jax.profiler.start_trace(str(self._directory / str(step)))

    def close(self, drain: Callable[[], None]) -> None:
        """End a running trace."""
        if not self._traced:
            return
        drain()
        jax.profiler.stop_trace()
        path, self._traced = self._directory / str(self._traced.start), range(0)
        self._log(f"trace in {path}; to open it: xprof --logdir={path}")

    def _slow(self, seconds: float) -> str:
        """A description of a slow step; empty for others."""
        median = statistics.median(self._recent) if len(self._recent) >= MIN_STEPS else float("inf")
        self._recent.append(seconds)
        if not self._slow_step or seconds <= self._slow_step * median:
            return ""
        return f"a step took {seconds:.3g} s, the median is {median:.3g} s"
