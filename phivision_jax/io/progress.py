"""Progress of long work: a line that is updated in place on a terminal, lines of text in a log."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

from rich.console import Console
from rich.live import Live
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

_FORMATS: dict[str, Callable[[float], str]] = {
    "loss": lambda value: f"loss {value:.4g}",
    "tokens_per_s": lambda value: f"{value:,.0f} tokens/s",
    "mfu": lambda value: f"MFU {value:.1%}",
    "goodput": lambda value: f"goodput {value:.1%}",
    "eval/accuracy": lambda value: f"accuracy {value:.1%}",
}
"""The metrics that a training run shows, in this order."""


@contextlib.contextmanager
def bar(description: str, total: int, *, in_bytes: bool = False, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """Show a bar over ``total`` items or bytes; yield a function that takes how many more are done."""
    counts = [DownloadColumn(), TransferSpeedColumn()] if in_bytes else [MofNCompleteColumn()]
    columns = [TextColumn("{task.description}"), BarColumn(), *counts]
    times = [TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()]
    with Progress(*columns, *times, disable=not shown) as progress:
        task = progress.add_task(description, total=total)
        yield lambda n: progress.advance(task, n)


class TrainingBar:
    """One line about a training run: steps, the newest metrics, the time left at the speed since this start.

    Args:
      total: steps of the run.
      first: the step from which this start continues.
      show: prints a line, or replaces the one on a terminal.
      clock: seconds, from any origin.
    """

    def __init__(
        self, total: int, first: int, show: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._total, self._first, self._show, self._clock, self._began = total, first, show, clock, clock()
        self._values: dict[str, float] = {}

    def update(self, done: int, **values: float) -> None:
        """Show a step; a metric of ``_FORMATS`` stays until there is a newer value."""
        self._values |= values
        parts = [form(self._values[name]) for name, form in _FORMATS.items() if name in self._values]
        if done > self._first:
            rate = (self._clock() - self._began) / (done - self._first)
            parts.insert(1, f"{timedelta(seconds=round(rate * (self._total - done)))} left")
        self._show(f"step {done:,}/{self._total:,}  {' · '.join(parts)}")


@contextlib.contextmanager
def training_bar(
    steps: int, first: int, *, shown: bool = True, console: Console | None = None
) -> Iterator[TrainingBar]:
    """Open the line of a training run.

    Args:
      shown: False on every process but the first: nothing is printed.
      console: default: standard output, with control characters only if that is a terminal.
    """
    console = console or Console(quiet=not shown)
    if not (console.is_terminal and shown):
        yield TrainingBar(steps, first, lambda line: console.out(line, highlight=False))
        return
    with Live(console=console, auto_refresh=False) as live:  # a line too long for the terminal loses its end
        yield TrainingBar(
            steps, first, lambda line: live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)
        )
