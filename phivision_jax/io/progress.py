"""Progress of long work, all of one look (rich): a line that stays in place on a terminal, lines of text in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
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

_FORMATS: dict[str, Callable[[float], str]] = {
    "loss": lambda value: f"loss {value:.4g}",
    "tokens_per_s": lambda value: f"{value:,.0f} tokens/s",
    "mfu": lambda value: f"MFU {value:.1%}",
    "goodput": lambda value: f"goodput {value:.1%}",
    "eval/accuracy": lambda value: f"accuracy {value:.1%}",
}
"""What a training shows of its metrics, in this order."""
_WIDE = 132
"""Columns of a terminal that has room for a bar beside them."""


@contextmanager
def bar(description: str, total: int, *, in_bytes: bool = False, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """A bar over ``total`` items or bytes; yields a function that takes how many more are done."""
    counts = [DownloadColumn(), TransferSpeedColumn()] if in_bytes else [MofNCompleteColumn()]
    columns = [TextColumn("{task.description}"), BarColumn(), *counts]
    times = [TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()]
    with Progress(*columns, *times, disable=not shown) as progress:
        task = progress.add_task(description, total=total)
        yield lambda n: progress.advance(task, n)


class TrainingBar:
    """One line about a training: steps, the newest metrics, the time that is left at the speed since the start.

    Args:
      total: steps of the whole training.
      first: the step that this start went on from.
      progress: of a terminal; None prints a line at each update.
      console: to print it on.
      clock: seconds, from anywhere.
    """

    def __init__(
        self,
        total: int,
        first: int,
        progress: Progress | None,
        console: Console,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._first, self._clock, self._began = total, first, clock, clock()
        self._progress, self._console = progress, console
        self._shown: dict[str, float] = {}
        text = f"step {first:,}/{total:,}"
        self._task = progress.add_task("", total=total, completed=first, text=text) if progress else None

    def update(self, done: int, **values: float) -> None:
        """After this step; of its metrics, what ``_FORMATS`` names is shown until a newer value comes."""
        self._shown |= {name: value for name, value in values.items() if name in _FORMATS}
        parts = [form(self._shown[name]) for name, form in _FORMATS.items() if name in self._shown]
        if done > self._first:
            rate = (self._clock() - self._began) / (done - self._first)
            parts.insert(1, f"{_clock_time(rate * (self._total - done))} left")
        text = f"step {done:,}/{self._total:,}  {' · '.join(parts)}"
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done, text=text)
        else:
            self._console.out(text, highlight=False)


@contextmanager
def training_bar(
    steps: int, first: int, *, shown: bool = True, console: Console | None = None
) -> Iterator[TrainingBar]:
    """The training's line.

    Args:
      shown: False says nothing (every process but the first).
      console: default: standard output, with control characters only where that is a terminal.
    """
    console = Console(quiet=not shown) if console is None else console
    if not (console.is_terminal and shown):
        yield TrainingBar(steps, first, None, console)
        return
    # One column of text: where the terminal is too narrow, its end is left out and not a part of everything.
    text = TextColumn("{task.fields[text]}")
    columns = (BarColumn(bar_width=20), text) if console.width >= _WIDE else (text,)
    with Progress(*columns, console=console) as progress:
        yield TrainingBar(steps, first, progress, console)


def _clock_time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
