"""Progress bars of long work, all of one look (rich); silent where output is not a terminal, but for the last state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def _progress(*extra: str, shown: bool = True) -> Progress:
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *map(TextColumn, extra)]
    return Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), disable=not shown)


@contextmanager
def bar(description: str, total: int, *, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """A bar over ``total`` things; what it gives is told how many more are done."""
    with _progress(shown=shown) as progress:
        task = progress.add_task(description, total=total)
        yield lambda n: progress.advance(task, n)


class TrainingBar:
    """The training's bar, with the newest loss, speed and accuracy beside it."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task
        self._shown: dict[str, float] = {}

    def update(self, done: int, **values: float) -> None:
        self._shown |= values
        text = "  ".join(f"{name.replace('_per_s', '/s')} {value:,.4g}" for name, value in self._shown.items())
        self._progress.update(self._task, completed=done, values=text)


@contextmanager
def training_bar(steps: int, first: int) -> Iterator[TrainingBar]:
    with _progress("{task.fields[values]}") as progress:
        yield TrainingBar(progress, progress.add_task("train", total=steps, completed=first, values=""))
