"""Progress of long work: a line that is updated in place on a terminal, lines of text in a log."""

import contextlib
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

from rich import progress
from rich.console import Console
from rich.live import Live
from rich.text import Text

from phivision_jax.io.messages import printable

_FORMATS = {
    "loss": "loss {:.4g}",
    "validation/loss": "validation loss {:.4g}",
    "tokens_per_s": "{:,.0f} tokens/s",
    "mfu": "MFU {:.1%}",
    "goodput": "goodput {:.1%}",
    "eval/accuracy": "accuracy {:.1%}",
}
"""The metrics that a training run shows, in this order."""


@contextlib.contextmanager
def bar(
    description: str, total: int, *, done: int = 0, in_bytes: bool = False, shown: bool = True
) -> Iterator[Callable[..., None]]:
    """Show a bar over ``total`` items or bytes; yield a function that takes how many more are done, and perhaps a note.

    Args:
      done: items that an earlier start has done; the time left is that of the others.
    """
    sizes = (progress.DownloadColumn, progress.TransferSpeedColumn) if in_bytes else (progress.MofNCompleteColumn,)
    columns = [progress.TextColumn("{task.description}", markup=False), progress.BarColumn(), *(c() for c in sizes)]
    times = [progress.TimeElapsedColumn(), progress.TextColumn("left"), progress.TimeRemainingColumn()]
    note_column = progress.TextColumn("{task.fields[note]}", markup=False)
    with progress.Progress(*columns, *times, note_column, disable=not shown) as display:
        task = display.add_task(printable(description), total=total, completed=done, note="")
        yield lambda n, **fields: display.update(task, advance=n, **fields)


@contextlib.contextmanager
def training_bar(total: int, first: int, *, shown: bool = True, console: Console | None = None) -> Iterator[Callable]:
    """Open the line of a training run: steps, the newest metrics, the time left at the speed since this start.

    Yields a function of the number of steps done and of metrics by name. It prints a line, or replaces the one on a
    terminal; a metric of ``_FORMATS`` stays until there is a newer value.

    Args:
      total: steps of the run.
      first: the step from which this start continues.
      shown: False on every process but the first: nothing is printed.
      console: default: standard output, with control characters only if that is a terminal.
    """
    console, began, newest = console or Console(quiet=not shown), time.monotonic(), dict[str, float]()
    live = Live(console=console, auto_refresh=False) if console.is_terminal and shown else None

    def update(done: int, **values: float) -> None:
        newest.update(values)
        parts = [form.format(newest[name]) for name, form in _FORMATS.items() if name in newest]
        if done > first:
            rate = (time.monotonic() - began) / (done - first)
            parts.insert(1, f"{timedelta(seconds=round(rate * (total - done)))} left")
        line = f"step {done:,}/{total:,}  {' · '.join(parts)}"
        if live:  # a line too long for the terminal loses its end
            live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)
        else:
            console.out(line, highlight=False)

    with live or contextlib.nullcontext():
        yield update
