"""``data.stats`` as a figure, and as a page that holds the figure and the tables in one file."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from phivision_jax.batch import RowShape
from phivision_jax.data.records import MODES, TASKS
from phivision_jax.data.view.statistics import MOST_IMAGES, Part, Stats
from phivision_jax.data.view.statistics_tables import Section, sections

# Okabe and Ito's colours, which the colour-blind tell apart.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#999999")
_RED = "#e0322f"
_DARK: Any = {
    "figure.facecolor": "#16181c",
    "axes.facecolor": "#16181c",
    "savefig.facecolor": "#16181c",
    "text.color": "#e6e6e6",
    "axes.labelcolor": "#e6e6e6",
    "axes.edgecolor": "#8a8f98",
    "xtick.color": "#c8c8c8",
    "ytick.color": "#c8c8c8",
    "legend.facecolor": "#16181c",
}


def plot_png(stats: Stats, path: str | Path) -> None:
    """The figure as a PNG of about 1,500 x 900 pixels."""
    Path(path).write_bytes(_png(stats, dark=False))


def _png(stats: Stats, *, dark: bool) -> bytes:
    with rc_context({"font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left", **(_DARK if dark else {})}):
        figure = Figure(figsize=(13.6, 8.2), layout="constrained")
        places = figure.subplots(2, 3)
        capacity, parts = stats.capacity, _shown(stats)
        _resolutions(places[0, 0], stats, dark)
        bins = stats.edges["columns"]
        _histogram(places[0, 1], parts, "columns", bins, "columns per example (text tokens + patches)")
        _limit(places[0, 1], capacity.length, f"T = {capacity.length:,}")
        _histogram(places[0, 2], parts, "patches", bins, "patches per example (examples with images)")
        _limit(places[0, 2], capacity.total_patches, _patches_of_a_row(capacity))
        _tasks(places[1, 0], stats)
        _histogram(places[1, 1], parts, "text", bins, "text tokens per example")
        _images(places[1, 2], parts)
        if len(parts) > 1:
            handles, labels = places[1, 2].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=min(len(parts), 6), frameon=False)
        file = io.BytesIO()
        figure.savefig(file, dpi=110)
    return file.getvalue()


def _shown(stats: Stats) -> list[tuple[str, str, list[Part]]]:
    """Name, colour and parts of each kind of bar: the largest datasets, and the others as one."""
    parts = list(stats.parts[:-1] or stats.parts)
    names = [(part.name, [part]) for part in parts]
    if len(parts) > len(_COLOURS):
        order = sorted(parts, key=lambda part: -part.examples)
        first = order[: len(_COLOURS) - 1]
        names = [(part.name, [part]) for part in first]
        names.append((f"{len(parts) - len(first)} others", order[len(first) :]))
    return [(name, colour, of) for (name, of), colour in zip(names, _COLOURS, strict=False)]


def _patches_of_a_row(capacity: RowShape) -> str:
    if capacity.vision_rows == 1:
        return f"P = {capacity.num_patches:,}"
    return f"R × P = {capacity.vision_rows} × {capacity.num_patches:,}"


def _number(value: float, _: Any = None) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.04)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(_number))


def _nothing(axes: Axes) -> None:
    axes.set(xticks=[], yticks=[], xlabel="", ylabel="")
    axes.minorticks_off()
    axes.text(0.5, 0.5, "none", ha="center", va="center", transform=axes.transAxes)


def _histogram(
    axes: Axes, parts: Sequence[tuple[str, str, list[Part]]], name: str, bins: Sequence[float], title: str
) -> None:
    below = np.zeros(len(bins) - 1)
    for label, colour, of in parts:
        counts = np.sum([part.histograms[name] for part in of], axis=0)
        axes.bar(bins[:-1], counts, np.diff(bins), bottom=below, align="edge", color=colour, label=label)
        below = below + counts
    held = np.flatnonzero(below)
    axes.set(xscale="log", title=title, ylabel="examples")
    if len(held):
        axes.set_xlim(bins[max(held[0] - 2, 0)], bins[min(held[-1] + 3, len(bins) - 1)])
    else:
        return _nothing(axes)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
    axes.xaxis.set_major_formatter(FuncFormatter(_number))
    axes.xaxis.set_minor_locator(NullLocator())
    _plain(axes)


def _limit(axes: Axes, at: float, label: str) -> None:
    """A line where a row ends; always within the picture, so that its distance from the data shows."""
    if at < 1 or not len(axes.get_xticks()):
        return
    low, high = axes.get_xlim()
    axes.set_xlim(low, max(high, at * 1.5))
    axes.axvline(at, color=_RED, linewidth=1.2, linestyle="--")
    axes.annotate(label, (at, 0.98), xycoords=("data", "axes fraction"), xytext=(-4, 0), textcoords="offset points",
                  color=_RED, ha="right", va="top", rotation=90, fontsize=8)  # fmt: skip


def _resolutions(axes: Axes, stats: Stats, dark: bool) -> None:
    edges, counts = stats.edges["side"], np.array(stats.all.resolutions, float).T
    axes.set(xscale="log", yscale="log", title="images by width and height", xlabel="width, pixels", ylabel="height")
    if counts.any():
        shades = "viridis" if dark else "viridis_r"
        drawn = axes.pcolormesh(
            edges, edges, np.ma.masked_equal(counts, 0), norm=LogNorm(1, counts.max() + 1), cmap=shades
        )
        bar = axes.figure.colorbar(drawn, ax=axes, fraction=0.04, pad=0.02, format=FuncFormatter(_number))
        bar.ax.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5), numticks=20), minor_locator=NullLocator())
        bar.set_label("images")
        wide, high = np.flatnonzero(counts.any(axis=0)), np.flatnonzero(counts.any(axis=1))
        low, top = min(wide[0], high[0]), max(wide[-1], high[-1])
        limits = edges[max(low - 4, 0)], edges[min(top + 5, len(edges) - 1)]
        axes.set(xlim=limits, ylim=limits)
    else:
        return _nothing(axes)
    ticks = [32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384]
    for axis in (axes.xaxis, axes.yaxis):
        low, top = axes.get_xlim()
        axis.set_ticks([tick for tick in ticks if low <= tick <= top])
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    low, top = axes.get_xlim()
    widths = np.geomspace(low, top, 100)
    for patches, style in zip(stats.patch_range, (":", "--"), strict=True):
        heights = patches * stats.patch_size**2 / widths
        axes.plot(widths, heights, style, color=_RED, linewidth=1.2, scalex=False, scaley=False)
    least, most = stats.patch_range
    axes.text(0.5, -0.2, f"dotted: {least:,} patches, smaller are enlarged · dashed: {most:,}, larger are shrunk",
              ha="center", color=_RED, fontsize=8, transform=axes.transAxes)  # fmt: skip
    axes.set_aspect("equal")


def _tasks(axes: Axes, stats: Stats) -> None:
    """Two bars per task: its share of the examples above its share of the columns, thinking apart."""
    part = stats.all
    examples, columns = np.array(part.examples_by, float), np.array(part.columns_by, float)
    present = [t for t in np.argsort(-examples.sum(axis=0), kind="stable").tolist() if examples[:, t].any()]
    at = np.arange(len(present))
    for values, shift, alpha, what in ((examples, -0.2, 1.0, "examples"), (columns, 0.2, 0.55, "columns")):
        shares, left = values / values.sum(), np.zeros(len(present))
        for m, colour in enumerate(("#7b3294", "#1b9e77")):
            axes.barh(at + shift, shares[m, present], 0.38, left=left, color=colour, alpha=alpha,
                      label=f"{MODES[m]}, of {what}")  # fmt: skip
            left = left + shares[m, present]
    axes.set(title="tasks and modes", yticks=at, yticklabels=[TASKS[t] for t in present])
    axes.set_ylim(max(len(present), 3) - 0.4, -0.6)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=8, loc="lower right")


def _images(axes: Axes, parts: Sequence[tuple[str, str, list[Part]]]) -> None:
    last = max(i for _, _, of in parts for part in of for i, n in enumerate(part.images_per_example) if n)
    at, below = np.arange(last + 1), np.zeros(last + 1)
    for label, colour, of in parts:
        counts = np.sum([part.images_per_example[: last + 1] for part in of], axis=0)
        axes.bar(at, counts, 0.8, bottom=below, color=colour, label=label)
        below = below + counts
    axes.set(title="images per example", ylabel="examples", xticks=at)
    axes.set_xticklabels([f"{i}+" if i == MOST_IMAGES else str(i) for i in at])
    axes.set_xlim(-0.6, max(last, 3) + 0.6)
    _plain(axes)


# ---------------------------------------------------------------------------------------------------------------------
# The page.

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root {{ color-scheme: light dark; --line: #d5d8dd; --soft: #666; --stripe: #f5f6f8 }}
@media (prefers-color-scheme: dark) {{
  :root {{ --line: #3a3e45; --soft: #a0a4ab; --stripe: #1e2126 }}
  body {{ background: #16181c; color: #e6e6e6 }}
}}
body {{ font: 15px/1.45 system-ui, sans-serif; max-width: 1320px; margin: 2rem auto; padding: 0 1rem }}
h1 {{ font-size: 1.5rem }} h2 {{ font-size: 1.1rem; margin: 2rem 0 .4rem }}
p.note {{ color: var(--soft); margin: .2rem 0 .6rem; font-size: .9rem }}
img {{ width: 100%; height: auto }}
main {{ display: flex; flex-wrap: wrap; gap: 0 3.5rem; align-items: flex-start }}
section {{ max-width: 100% }}
.scroll {{ overflow-x: auto }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
th, td {{ padding: .22rem .8rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }}
th:first-child, td:first-child, table.named td:nth-child(2), table.named th:nth-child(2) {{ text-align: left }}
td:first-child {{ white-space: pre }}
tr:nth-child(even) td {{ background: var(--stripe) }}
tr.heading td {{ font-weight: 600; background: none; padding-top: .7rem }}
</style></head><body>
<h1>{title}</h1>
<picture><source srcset="{dark}" media="(prefers-color-scheme: dark)"><img src="{light}" alt="{alt}"></picture>
<main>
{tables}
</main>
</body></html>
"""


def write_html(stats: Stats, path: str | Path) -> None:
    """One file, nothing to fetch: the figure for light and dark screens, and the tables."""
    names = ", ".join(part.name for part in (stats.parts[:-1] or stats.parts))
    page = _PAGE.format(
        title=html.escape(f"{names}: {stats.all.examples:,} examples, {stats.all.images:,} images"),
        light=_data_uri(_png(stats, dark=False)),
        dark=_data_uri(_png(stats, dark=True)),
        alt="Histograms of image sizes, columns, patches, text tokens, images per example and tasks; the tables follow",
        tables="\n".join(_html_table(section) for section in sections(stats)),
    )
    Path(path).write_text(page, encoding="utf-8")


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _html_table(section: Section) -> str:
    named = "" if section.header[0] == "" else ' class="named"'
    lines = [f"<section><h2>{html.escape(section.title)}</h2>"]
    if section.note:
        lines.append(f'<p class="note">{html.escape(section.note)}</p>')
    lines.append(f'<div class="scroll"><table{named}><tr>')
    lines.append("".join(f"<th>{html.escape(head)}</th>" for head in section.header) + "</tr>")
    for row in section.rows:
        if len(row) == 1:
            lines.append(f'<tr class="heading"><td colspan="{len(section.header)}">{html.escape(row[0])}</td></tr>')
        else:
            lines.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>")
    lines.append("</table></div></section>")
    return "\n".join(lines)
