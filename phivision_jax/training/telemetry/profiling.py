"""Traces of ``jax.profiler``: of the steps that a configuration names, and of the steps after a slow one.

Every process writes its own files into ``run/profile/<first step>``; ``xprof`` shows them side by side. A trace begins
and ends where no step is under way, so that it holds whole steps: the devices wait for the host twice for it.
"""

from __future__ import annotations

import re
import statistics
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax

DIRECTORY = "profile"
WINDOW = 50
"""Steps whose median a slow one is compared with."""
LEAST = 10
"""Steps that must have been taken before one can be slow; the first are often."""
AFTER_SLOW = 3
"""Steps that are traced after a slow one."""


def parse_steps(text: str) -> range:
    """``"100:103"`` is the steps 100, 101 and 102, of which the run's first is 1; empty: none.

    Raises:
      ValueError: for anything else.
    """
    if not text:
        return range(0)
    found = re.fullmatch(r"(\d{1,12}):(\d{1,12})", text)
    steps = range(int(found[1]), int(found[2])) if found else range(0)
    if not steps or steps[0] < 1:
        raise ValueError(
            f"profile is {text!r}; give the steps to trace as FIRST:END, like '100:103' for the steps 100, 101 and "
            "102, or nothing for none"
        )
    return steps


class Profiler:
    """Traces steps as they come by.

    Args:
      run: the run's directory.
      profile: steps to trace, see ``parse_steps``.
      slow_step: a step that takes so many times the median of the ``WINDOW`` before it has the next ``AFTER_SLOW``
        traced, the first time that happens; 0: never.
      say: told where a trace lies and how to open it.
      start, stop: begin a trace into a directory, end it.

    Raises:
      ValueError: for ``profile`` malformed; for a ``slow_step`` that would take ordinary steps for slow ones.
    """

    def __init__(
        self,
        run: Path,
        profile: str = "",
        slow_step: float = 0.0,
        say: Callable[[str], None] = print,
        *,
        start: Callable[[str], Any] = jax.profiler.start_trace,
        stop: Callable[[], Any] = jax.profiler.stop_trace,
    ) -> None:
        if slow_step and not slow_step > 1:
            raise ValueError(
                f"slow_step is {slow_step}; a slow step takes more than 1 times the median, or 0 for never"
            )
        self._directory, self._say, self._start, self._stop = run / DIRECTORY, say, start, stop
        self._asked, self._slow_step = parse_steps(profile), slow_step
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._end: int | None = None
        self._begun = 0

    def before(self, step: int, drain: Callable[[], None], durations: Iterable[float] = ()) -> None:
        """Call before each step is handed over, and once with the step after the last.

        Args:
          step: the one that comes next, from 1.
          drain: waits until no step is under way; called where a trace begins or ends.
          durations: seconds of the steps that were finished since the call before.
        """
        slow = self._find_slow(durations)
        if self._end is not None and step >= self._end:
            self._finish(drain)
        if self._end is not None:
            return
        if step in self._asked:
            self._begin(step, self._asked.stop, drain)
        elif slow:
            took, median = slow
            self._say(f"a step took {took:.3g} s, the median is {median:.3g} s: tracing the next {AFTER_SLOW}")
            self._slow_step = 0.0
            self._begin(step, step + AFTER_SLOW, drain)

    def close(self, drain: Callable[[], None]) -> None:
        """End a trace that is under way."""
        if self._end is not None:
            self._finish(drain)

    def _find_slow(self, durations: Iterable[float]) -> tuple[float, float] | None:
        """(seconds, median) of a slow step among these."""
        slow = None
        for took in durations:
            if self._slow_step and len(self._recent) >= LEAST:
                median = statistics.median(self._recent)
                slow = (took, median) if took > self._slow_step * median else slow
            self._recent.append(took)
        return slow

    def _begin(self, step: int, end: int, drain: Callable[[], None]) -> None:
        drain()
        self._begun, self._end = step, end
        self._start(str(self._directory / str(step)))

    def _finish(self, drain: Callable[[], None]) -> None:
        drain()
        self._stop()
        self._end = None
        where = self._directory / str(self._begun)
        self._say(f"trace from step {self._begun} on in {where}; to look at it: xprof --logdir={where}")
