"""Reports made of sections: tables in the terminal, and one HTML page with figures, tables and text.

    Section ──► print_sections   the tables
            └─► page             everything, in one file that fetches nothing; text is escaped

The page follows the reader's light or dark theme, and so does a figure of ``plot``.
"""

import base64
import contextlib
import functools
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jinja2
from matplotlib import font_manager, style
from matplotlib.figure import Figure as Canvas
from matplotlib.text import Text
from PIL import Image
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text as RichText

from phivision_jax.io.messages import printable

type Style = Literal["plain", "strong", "soft", "faint", "accent", "good", "warning"]

_HERE = Path(__file__).parent
_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(_HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True
)
RED = "#e0322f"
"""Marks limits in figures."""


class Table(NamedTuple):
    """Cells of text."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    """A row of one cell is a heading within the table."""
    names: int = 1
    """Number of leading columns of names, aligned left; the rest are numbers, aligned right."""
    colours: Sequence[str] = ()
    """A colour per row, shown before its first cell on a page; or none."""


class Figure(NamedTuple):
    """A PNG with a caption."""

    png: bytes
    caption: str
    dark: bytes | None = None
    """The same for dark screens; a figure that has one is shown over the full width of the page."""


class Span(NamedTuple):
    """A stretch of text in one style; line breaks in it are kept."""

    text: str
    style: Style = "plain"


class Section(NamedTuple):
    """A heading and what follows it."""

    title: str
    note: str = ""
    figures: Sequence[Figure] = ()
    table: Table | None = None
    text: Sequence[Span] = ()
    id: str = ""
    """Id of an element at the end of the section, which a script fills; "" for none."""


def plot(draw: Callable[[Canvas], None], caption: str, height: float) -> Figure:
    """Draw a figure 13.6 inches (1,496 pixels) wide, once for light and once for dark screens.

    Args:
      draw: fills an empty matplotlib figure. Colours that it leaves open follow the theme.
      caption: below the figure.
      height: in inches of 110 pixels.
    """
    pngs = []
    for styles in (["figures"], ["figures", "figures_dark"]):
        with style.context([_HERE / f"{name}.mplstyle" for name in styles]):
            canvas = Canvas(figsize=(13.6, height), layout="constrained")
            draw(canvas)
            pngs.append(_png(canvas))
    return Figure(pngs[0], caption, pngs[1])


def text_image(lines: Sequence[str], colour: str, width: int, line_height: int) -> Image.Image:
    """Lines of text in a colour on white, in fonts that have the characters; sizes in pixels."""
    canvas = Canvas(figsize=(width / 100, len(lines) * line_height / 100), dpi=100, facecolor="white")
    for i, line in enumerate(lines):
        y = 1 - (i + 0.5) / len(lines)
        canvas.text(0, y, line, color=colour, va="center_baseline", family="monospace", size=10.8, parse_math=False)
    return Image.open(io.BytesIO(_png(canvas))).convert("RGB")


def _png(canvas: Canvas) -> bytes:
    """The figure, in fonts that have its characters."""
    texts, file = canvas.findobj(Text), io.BytesIO()
    families = _families(frozenset("".join(text.get_text() for text in texts)))
    for text in texts:
        text.set_fontfamily([*text.get_fontfamily(), *families])
    canvas.savefig(file)
    return file.getvalue()


@functools.cache
def _families(characters: frozenset[str]) -> list[str]:
    """Names of installed fonts that together have as many of the characters as possible."""
    missing, found = {*map(ord, characters)}, []
    for font in font_manager.fontManager.ttflist:
        if not missing:
            break
        with contextlib.suppress(RuntimeError, OSError):  # of fonts that cannot be scaled, as of coloured emoji
            loaded = font_manager.get_font(font.fname)
            loaded.set_size(10, 72)
            if new := missing & loaded.get_charmap().keys():
                missing -= new
                found.append(font.name)
    return found


def image_figure(image: Image.Image, caption: str) -> Figure:
    """A figure of an image's pixels."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return Figure(file.getvalue(), caption)


def print_sections(sections: Sequence[Section], console: Console | None = None) -> None:
    """Print the tables of sections, each with its title above and its note below."""
    console = console or Console()
    for section in sections:
        if section.table is None:
            continue
        shown = RichTable()
        for i, name in enumerate(section.table.header):
            side: Literal["left", "right"] = "left" if i < section.table.names else "right"
            shown.add_column(RichText(printable(name)), justify=side, overflow="fold")
        for row in section.table.rows:
            if len(row) == 1:
                shown.add_section()
            shown.add_row(*(RichText(printable(cell), "bold" if len(row) == 1 else "") for cell in row))
        title, note = printable(section.title), printable(section.note)
        console.print(RichText(title, "bold"), shown, RichText(note, "dim"), sep="\n")


def data_uri(png: bytes) -> str:
    """The address of an image that is part of the page."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def page(
    title: str,
    sections: Sequence[Section],
    *,
    scripts: Sequence[str] = (),
    stylesheets: Sequence[str] = (),
    address: Callable[[bytes], str] = data_uri,
) -> str:
    """One HTML page: a title, and the sections in order.

    Its Content-Security-Policy allows nothing but files beside the page, whether it is opened as a file or served.

    Args:
      scripts: relative addresses of files that run in this order once the page is read.
      stylesheets: relative addresses of style sheets.
      address: maps the PNG of a figure to its address; default: figures are part of the page.
    """
    files = {"scripts": scripts, "stylesheets": stylesheets}
    return render("page.html.jinja", title=title, sections=sections, address=address, **files)


def render(template: str, **values: Any) -> str:
    """Fill in a template of this folder; text is escaped."""
    return _ENVIRONMENT.get_template(template).render(values)
