"""``data.stats`` as tables: for the terminal, and for the page of ``stats_page``."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from phivision_jax.batch import RowShape
from phivision_jax.data.plan.plan import WINDOW
from phivision_jax.data.records import MODES, TASKS
from phivision_jax.data.view.statistics import MOST_IMAGES, Part, Spread, Stats


@dataclasses.dataclass(frozen=True)
class Section:
    """A table: the first column names, the others are numbers. A row of one cell is a heading within it."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def sections(stats: Stats) -> list[Section]:
    parts, capacity = stats.parts, stats.capacity
    header = ("", *(part.name for part in parts))
    made = [
        Section("Size", header, _size_rows(parts)),
        Section(
            "Lengths and sizes", header, _spread_rows(parts), "A patch takes one column of a row, as a token does."
        ),
        Section("Modes and tasks", header, _mix_rows(parts), "In each cell: share of examples · share of columns."),
        Section(
            f"Into rows of T = {capacity.length:,} columns and R × P = {capacity.vision_rows} × "
            f"{capacity.num_patches:,} patches",
            header,
            _fit_rows(parts, capacity),
            f"Rows and padding of one epoch, from packing {WINDOW:,} examples at most.",
        ),
    ]
    if stats.all.largest:
        rows = tuple((f"{r.dataset} #{r.record}", r.id, f"{r.columns:,}", f"{r.patches:,}") for r in stats.all.largest)
        made.append(Section("The largest that do not fit", ("record", "id", "columns", "patches"), rows))
    return made


def _size_rows(parts: Sequence[Part]) -> tuple[tuple[str, ...], ...]:
    reasons = sorted({reason for part in parts for reason in part.quarantined})
    bad_of = [sum(part.quarantined.values()) for part in parts]
    rows = [
        ("examples", *(f"{p.examples:,}" for p in parts)),
        *_count_rows("… with", parts),
        ("images", *(f"{p.images:,}" for p in parts)),
        ("text tokens", *(f"{p.text_tokens:,}" for p in parts)),
        ("patches", *(f"{p.patches:,}" for p in parts)),
        ("examples with a system message", *(_share(p.system_messages, p.examples) for p in parts)),
        ("not imported", *(_share(bad, p.examples + bad) for p, bad in zip(parts, bad_of, strict=True))),
        *((f"  {reason}", *(f"{p.quarantined.get(reason, 0):,}" for p in parts)) for reason in reasons),
    ]
    return tuple(rows)


def _count_rows(prefix: str, parts: Sequence[Part]) -> list[tuple[str, ...]]:
    rows = []
    for count in range(MOST_IMAGES + 1):
        if any(p.images_per_example[count] for p in parts):
            label = "no image" if count == 0 else f"{count} image{'s' if count > 1 else ''}"
            label += " or more" if count == MOST_IMAGES else ""
            rows.append((f"{prefix} {label}", *(_share(p.images_per_example[count], p.examples) for p in parts)))
    return rows


def _spread_rows(parts: Sequence[Part]) -> tuple[tuple[str, ...], ...]:
    """Under a heading for each measure: median, mean, what 95 % stay below, the largest."""
    measures: list[tuple[str, list[Spread | None], int]] = [
        ("text tokens per example", [p.text for p in parts], 0),
        ("patches per example (of those with images)", [p.patches_per_example for p in parts], 0),
        ("columns per example (text tokens and patches)", [p.columns for p in parts], 0),
        ("patches per image", [p.patches_per_image for p in parts], 0),
        ("megapixels per image", [p.megapixels for p in parts], 2),
    ]
    labels = {"median": "median", "mean": "mean", "p95": "95 % have at most", "most": "most"}
    rows: list[tuple[str, ...]] = []
    for name, spreads, digits in measures:
        if any(spreads):
            rows.append((name,))
            for field, label in labels.items():
                values = [f"{getattr(s, field):,.{digits}f}" if s else "–" for s in spreads]
                rows.append((f"  {label}", *values))
    return tuple(rows)


def _mix_rows(parts: Sequence[Part]) -> tuple[tuple[str, ...], ...]:
    def shares(cells: Sequence[tuple[int, int]]) -> list[str]:
        """Of each part, the share of one group in examples and in columns."""
        out = []
        for part, (examples, columns) in zip(parts, cells, strict=True):
            total = part.text_tokens + part.patches
            out.append(f"{examples / part.examples:.1%} · {columns / total:.1%}" if examples else "–")
        return out

    rows: list[tuple[str, ...]] = [("mode",)]
    for m, mode in enumerate(MODES):
        rows.append((mode, *shares([(sum(p.examples_by[m]), sum(p.columns_by[m])) for p in parts])))
    rows.append(("task",))
    for t, task in enumerate(TASKS):
        cells = [(sum(m[t] for m in p.examples_by), sum(m[t] for m in p.columns_by)) for p in parts]
        if any(examples for examples, _ in cells):
            rows.append((task, *shares(cells)))
            for m, mode in enumerate(MODES):
                both = all(any(p.examples_by[k][t] for p in parts) for k in range(len(MODES)))
                if both:
                    rows.append((f"  {mode}", *shares([(p.examples_by[m][t], p.columns_by[m][t]) for p in parts])))
    rows.append(("where the mode comes from",))
    for origin in sorted({name for p in parts for name in p.mode_from}):
        rows.append((origin, *(_share(p.mode_from.get(origin, 0), p.examples) for p in parts)))
    return tuple(rows)


def _fit_rows(parts: Sequence[Part], capacity: RowShape) -> tuple[tuple[str, ...], ...]:
    return (
        (f"longer than {capacity.length:,} columns", *(_share(p.too_long, p.examples) for p in parts)),
        ("images that the patches do not take", *(_share(p.too_many_patches, p.examples) for p in parts)),
        ("rows of an epoch, about", *(f"{p.rows:,}" for p in parts)),
        ("padding in columns", *(f"{p.text_padding:.1%}" for p in parts)),
        ("padding in patches", *(f"{p.patch_padding:.1%}" for p in parts)),
    )


def _share(count: int, total: int) -> str:
    return f"{count:,} ({count / total:.1%})" if count and total else f"{count:,}"


def print_stats(stats: Stats, console: Console | None = None) -> None:
    """Print the tables."""
    console = console or Console()
    for section in sections(stats):
        table = Table(title=section.title, title_justify="left", caption=section.note, caption_justify="left")
        names = 2 if section.header[0] else 1  # the table of records has a name and an id
        for i, head in enumerate(section.header):
            table.add_column(head, justify="left" if i < names else "right", overflow="fold")
        for row in section.rows:
            if len(row) == 1:
                table.add_section()
                table.add_row(f"[bold]{row[0]}[/bold]")
            else:
                table.add_row(*row)
        console.print(table)


def as_text(stats: Stats, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    print_stats(stats, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()
