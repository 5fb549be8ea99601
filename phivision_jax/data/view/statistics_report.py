"""The statistics of datasets as a figure, and as tables with one column per dataset."""

import collections
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

from phivision_jax.batch import RowShape
from phivision_jax.data.plan.plan import WINDOW
from phivision_jax.data.records import MODES
from phivision_jax.data.view.statistics import MAX_IMAGES, Numbers, Statistics
from phivision_jax.io.html import RED, Figure, Section, Table, plot

_MEASURES = {
    "text_tokens": "text tokens per example",
    "patches": "patches per example (of those with images)",
    "tokens": "tokens per example (text and images)",
    "image_patches": "patches per image",
    "megapixels": "megapixels per image",
}
_VALUES = {"median": "median", "mean": "mean", "p95": "95th percentile", "max": "largest"}

type Cells = dict[str, dict[str, str]]
"""One dataset's column of a table: heading within the table, or "" → label of the row → the cell's text."""


def tables(stats: Statistics) -> list[Section]:
    """Tables of sizes, lengths, modes and tasks, and use of rows; the largest records that do not fit a row."""
    shape = stats.shape
    row = f"T = {shape.length:,} tokens and {_vision_size(shape)} patches"
    estimate = f"Rows and padding of one epoch are estimated by packing up to {WINDOW:,} examples."
    found = [
        Section("Size", table=_table(stats, _sizes)),
        Section("Lengths and sizes", table=_table(stats, _lengths)),
        Section("Modes and tasks", "In each cell: share of examples · share of tokens.", table=_table(stats, _mix)),
        Section(f"In rows of {row}", estimate, table=_table(stats, _packing)),
    ]
    if largest := stats.groups[-1]["largest"]:
        rows = [(f"{r['dataset']} #{r['record']}", r["id"], f"{r['tokens']:,}", f"{r['patches']:,}") for r in largest]
        table = Table(("record", "id", "tokens", "patches"), rows, names=2)
        found.append(Section("Largest records that do not fit a row", table=table))
    return found


def _table(stats: Statistics, cells: Callable[[Numbers], Cells]) -> Table:
    """A column per dataset. The last one, of all together, has every row that any of them has."""
    columns = [cells(numbers) for numbers in stats.groups]
    rows: list[tuple[str, ...]] = []
    for heading, labels in columns[-1].items():
        if heading:
            rows.append((heading,))
        rows += [(label, *(column.get(heading, {}).get(label, "–") for column in columns)) for label in labels]
    return Table(("", *(numbers["name"] for numbers in stats.groups)), rows)


def _share(count: int, total: int) -> str:
    return f"{count:,} ({count / total:.1%})" if count and total else f"{count:,}"


def _sizes(numbers: Numbers) -> Cells:
    examples, failed = numbers["examples"], sum(numbers["quarantined"].values())
    cells = {"examples": f"{examples:,}"}
    for n, count in enumerate(numbers["images_per_example"]):
        if count:
            label = f"  with {n or 'no'} image{'' if n == 1 else 's'}{' or more' if n == MAX_IMAGES else ''}"
            cells[label] = _share(count, examples)
    cells["  with a system message"] = _share(numbers["system_messages"], examples)
    for name in ("images", "text_tokens", "image_tokens", "patches"):
        cells[name.replace("_", " ")] = f"{numbers[name]:,}"
    cells["not imported"] = _share(failed, examples + failed)
    return {"": cells | {f"  {reason}": f"{count:,}" for reason, count in sorted(numbers["quarantined"].items())}}


def _lengths(numbers: Numbers) -> Cells:
    cells = {}
    for measure, title in _MEASURES.items():
        if spread := numbers["spreads"][measure]:
            digits = 2 if measure == "megapixels" else 0
            cells[title] = {f"  {label}": f"{spread[value]:,.{digits}f}" for value, label in _VALUES.items()}
    return cells


def _by_mode_and_task(numbers: Numbers, unit: str) -> np.ndarray:
    """[modes, tasks]: shares of the examples or tokens."""
    counts = np.array([list(by_task.values()) for by_task in numbers[f"{unit}_by"].values()])
    return counts / max(counts.sum(), 1)


def _tasks(numbers: Numbers) -> list[str]:
    return list(numbers["examples_by"][MODES[0]])


def _mix(numbers: Numbers) -> Cells:
    cells: Cells = collections.defaultdict(dict)
    shares = np.stack([_by_mode_and_task(numbers, unit) for unit in ("examples", "tokens")])
    rows = [("mode", mode, shares[:, m].sum(axis=1)) for m, mode in enumerate(MODES)]
    for t, task in enumerate(_tasks(numbers)):
        thinking = shares[:, MODES.index("think"), t]
        rows += [("task", task, shares[:, :, t].sum(axis=1)), ("task", f"  {task}, think", thinking)]
    for heading, label, (examples, tokens) in rows:
        if examples:
            cells[heading][f"  {label}"] = f"{examples:.1%} · {tokens:.1%}"
    for origin, count in sorted(numbers["mode_from"].items()):
        cells["origin of the mode"][f"  {origin}"] = _share(count, numbers["examples"])
    return cells


def _packing(numbers: Numbers) -> Cells:
    cells = {"more tokens than a row": _share(numbers["too_long"], numbers["examples"])}
    cells["more patches than a row"] = _share(numbers["too_many_patches"], numbers["examples"])
    cells["rows per epoch, about"] = f"{numbers['rows']:,}"
    cells["padding in tokens"] = f"{numbers['text_padding']:.1%}"
    cells["padding in patches"] = f"{numbers['patch_padding']:.1%}"
    return {"": cells}


# ---------------------------------------------------------------------------------------------------------------------
# The figure.


def figure(stats: Statistics) -> Figure:
    """Distributions of image sizes, lengths, tasks and images per example."""
    caption = "Image sizes, lengths, tasks and images per example; the tables below have the numbers."
    return plot(lambda canvas: _draw(canvas, stats), caption, 8.2)


def _draw(canvas: Canvas, stats: Statistics) -> None:
    axes = canvas.subplots(2, 3)
    _draw_resolutions(axes[0, 0], stats)
    _draw_lengths(axes[0, 1], stats, "tokens", stats.shape.length, f"T = {stats.shape.length:,}")
    _draw_lengths(axes[0, 2], stats, "patches", stats.shape.total_patches, _vision_size(stats.shape))
    _draw_tasks(axes[1, 0], stats.groups[-1])
    _draw_lengths(axes[1, 1], stats, "text_tokens")
    counts = np.arange(MAX_IMAGES + 1)
    _stack(axes[1, 2], stats, np.arange(MAX_IMAGES + 2) - 0.5, lambda numbers: numbers["images_per_example"])
    axes[1, 2].set(title="images per example", xticks=counts, xticklabels=[*map(str, counts[:-1]), f"{MAX_IMAGES}+"])
    handles, labels = axes[1, 2].get_legend_handles_labels()
    if len(labels) > 1:
        canvas.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6), fontsize=9)


def _vision_size(shape: RowShape) -> str:
    return f"R × P = {shape.vision_rows} × {shape.num_patches:,}"


def bars(stats: Statistics) -> list[tuple[str, list[Numbers]]]:
    """Label and datasets of each bar of a stack: up to eight bars, small datasets of many in the last one."""
    groups = stats.groups[:-1] or stats.groups
    if len(groups) <= 8:
        return [(numbers["name"], [numbers]) for numbers in groups]
    groups = sorted(groups, key=lambda numbers: -numbers["examples"])
    return [*((numbers["name"], [numbers]) for numbers in groups[:7]), (f"{len(groups) - 7} others", groups[7:])]


def _stack(axes: Axes, stats: Statistics, edges: np.ndarray, counts: Callable[[Numbers], Sequence[int]]) -> np.ndarray:
    """Draw a histogram of examples stacked by dataset; return its heights."""
    below = np.zeros(len(edges) - 1)
    for k, (label, groups) in enumerate(bars(stats)):
        top = below + np.sum([counts(numbers) for numbers in groups], axis=0)
        axes.stairs(top, edges, baseline=below, fill=True, color=f"C{k}", label=label)
        below = top
    axes.set(ylabel="examples", ylim=(0, max(below.max() * 1.05, 1)))
    axes.grid(axis="y")
    axes.yaxis.set(major_locator=MaxNLocator(integer=True), major_formatter=EngFormatter(sep=""))
    return below


def _draw_lengths(axes: Axes, stats: Statistics, measure: str, limit: int = 0, label: str = "") -> None:
    """Draw the histogram of a measure, and a line where a row ends."""
    bins = np.array(stats.edges["tokens"])
    axes.set(title=_MEASURES[measure])
    used = np.flatnonzero(_stack(axes, stats, bins, lambda numbers: numbers["histograms"][measure]))
    if not len(used):
        return _say_none(axes)
    # The limit is always in view, so that its distance from the data shows.
    high = max(bins[min(used[-1] + 3, len(bins) - 1)], limit * 1.5)
    axes.set(xscale="log", xlim=(bins[max(used[0] - 2, 0)], high))
    axes.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5), numticks=20), minor_locator=NullLocator())
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if limit:
        axes.axvline(limit, color=RED, linewidth=1.2, linestyle="--")
        axes.text(limit * 0.96, 0.98, label, color=RED, fontsize=8, rotation=90, ha="right", va="top",
                  transform=axes.get_xaxis_transform())  # fmt: skip


def _say_none(axes: Axes) -> None:
    axes.set(xticks=[], yticks=[], ylabel="")
    axes.text(0.5, 0.5, "none", ha="center", va="center", transform=axes.transAxes)


def _draw_resolutions(axes: Axes, stats: Statistics) -> None:
    edges, counts = np.array(stats.edges["side"]), np.array(stats.groups[-1]["resolutions"]).T
    axes.set(title="images by width and height, pixels")
    if not counts.any():
        return _say_none(axes)
    used = np.flatnonzero(counts.any(axis=0) | counts.any(axis=1))
    limits = edges[max(used[0] - 4, 0)], edges[min(used[-1] + 5, len(edges) - 1)]
    axes.set(xscale="log", yscale="log", xlim=limits, ylim=limits, aspect="equal")
    mesh = axes.pcolormesh(edges, edges, np.ma.masked_equal(counts, 0), norm=LogNorm(1, counts.max() + 1))
    bar = axes.figure.colorbar(mesh, ax=axes, fraction=0.04, pad=0.02, format=EngFormatter(sep=""))
    bar.ax.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5), numticks=20), minor_locator=NullLocator())
    for axis in (axes.xaxis, axes.yaxis):
        axis.set(major_locator=LogLocator(2, numticks=20), major_formatter="{x:g}", minor_locator=NullLocator())
    widths = np.geomspace(*limits, 100)
    for patches, line in zip(stats.patch_range, (":", "--"), strict=True):
        axes.plot(widths, patches * stats.patch_size**2 / widths, line, color=RED, linewidth=1.2, scaley=False)
    low, high = stats.patch_range
    axes.text(0.5, -0.14, f"dotted: {low:,} patches, smaller are enlarged · dashed: {high:,}, larger are shrunk",
              ha="center", color=RED, fontsize=8, transform=axes.transAxes)  # fmt: skip


def _draw_tasks(axes: Axes, numbers: Numbers) -> None:
    """Two bars per task, split by mode: its share of the examples above its share of the tokens."""
    total = _by_mode_and_task(numbers, "examples").sum(axis=0)
    tasks = [t for t in np.argsort(-total, kind="stable").tolist() if total[t]]
    y = np.arange(len(tasks))
    for unit, shift, alpha in (("examples", -0.2, 1.0), ("tokens", 0.2, 0.55)):
        left = np.zeros(len(tasks))
        for mode, share, colour in zip(MODES, _by_mode_and_task(numbers, unit), ("#7b3294", "#1b9e77"), strict=True):
            axes.barh(y + shift, share[tasks], 0.38, left=left, color=colour, alpha=alpha, label=f"{mode}, by {unit}")
            left += share[tasks]
    axes.set(title="tasks and modes", yticks=y, yticklabels=[_tasks(numbers)[t] for t in tasks])
    axes.set_ylim(max(len(tasks), 3) - 0.4, -0.6)
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.grid(axis="x")
    axes.legend(loc="lower right")
