"""Tests of the page builder: structure, escaping, figures for both themes."""

from __future__ import annotations

import base64
import io
import re
import warnings
from html.parser import HTMLParser

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from PIL import Image
from rich.console import Console

from phivision_jax.io import html
from phivision_jax.io.html import Figure, Section, Span, Table, image_figure, page, plot, print_sections, text_image

VOID = {"link", "meta", "img", "source", "br"}


class Checker(HTMLParser):
    """Collects text and attributes, and fails on tags that are not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)


def parse(html: str) -> Checker:
    checker = Checker()
    checker.feed(html)
    assert checker.open == []
    return checker


def test_page_escapes_everything() -> None:
    odd = '<b> & "quotes" </script>'
    sections = [
        Section(odd, odd, [Figure(b"png", odd)], Table([odd, odd], [[odd, odd], [odd]]), [Span(odd, "good")]),
    ]
    checker = parse(page(odd, sections))
    assert sum(text.strip() == odd.strip() for text in checker.text) == 11
    assert not {tag for tag, _ in checker.tags} & {"b", "script"}


def test_page_is_one_file_with_both_themes() -> None:
    figure = plot(lambda canvas: canvas.subplots().plot([1, 2]), "a line", 2.0)
    checker = parse(page("t", [Section("s", figures=[figure])]))
    sources = [attrs.get("srcset") or attrs.get("src") for tag, attrs in checker.tags if tag in ("source", "img")]
    assert all(source.startswith("data:image/png;base64,") for source in sources) and len(sources) == 2
    dark, light = (base64.b64decode(source.split(",")[1]) for source in sources)
    assert (light, dark) == (figure.png, figure.dark)
    corner = [Image.open(io.BytesIO(png)).convert("RGB").getpixel((0, 0)) for png in (light, dark)]
    assert corner == [(255, 255, 255), (0x16, 0x18, 0x1C)]
    assert Image.open(io.BytesIO(light)).size == (1496, 220)


def test_image_figure_keeps_pixels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    figure = image_figure(Image.fromarray(pixels), "noise")
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(figure.png))), pixels)


def test_page_keeps_text_as_it_is() -> None:
    html = page("t", [Section("s", text=[Span("two\n  lines"), Span("\n\nend", "soft")])])
    assert '<span class="plain">two\n  lines</span><span class="soft">\n\nend</span>' in html


def test_print_sections_prints_headings_and_brackets() -> None:
    console = Console(file=io.StringIO(), width=60, color_system=None)
    table = Table(("", "[b]x"), [("heading",), ("[red]name", "1")])
    print_sections([Section("no table"), Section("[i]Title", "a note", table=table)], console)
    text = console.file.getvalue()
    lines = [re.sub(r"\s+", " ", line.strip("│┃ ")) for line in text.splitlines()]
    assert "[i]Title" in lines and "a note" in lines and "heading" in lines and "[b]x" in text
    assert "[red]name │ 1" in lines and "no table" not in text


def test_printed_text_has_no_control_characters() -> None:
    console = Console(file=io.StringIO(), width=120, color_system=None)
    odd = "a\x1b]0;title\x07 \x1b[2J[/b]"
    print_sections([Section(odd, odd, table=Table((odd, "n"), [(odd, "1"), (odd,)]))], console)
    text = console.file.getvalue()
    assert "\x1b" not in text and "\x07" not in text
    assert text.count(r"a\x1b]0;title\x07 \x1b[2J[/b]") == 5


@pytest.mark.parametrize("name", [r"a$\frac{$b", "$", "$$x$", r"\alpha_{", "a$b$c", "{}", "_^"])
def test_names_in_figures_are_no_formulas(name) -> None:
    def draw(canvas) -> None:
        axes = canvas.subplots()
        axes.plot([0, 1], label=name)
        axes.set(title=name, xlabel=name, yticks=[0, 1], yticklabels=[name, name])
        axes.legend()

    assert plot(draw, name, 2.0).png.startswith(b"\x89PNG")


def test_figures_use_any_font_that_has_the_characters(tmp_path, monkeypatch) -> None:
    """A font of one square glyph, for a character that no installed font has."""
    builder, pen = FontBuilder(1000, isTTF=True), TTGlyphPen(None)
    for k, point in enumerate([(0, 0), (0, 800), (800, 800), (800, 0)]):
        (pen.lineTo if k else pen.moveTo)(point)
    pen.closePath()
    glyph = pen.glyph()
    builder.setupGlyphOrder([".notdef", "wide"])
    builder.setupCharacterMap({ord("漢"): "wide"})
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "wide": glyph})
    builder.setupHorizontalMetrics({".notdef": (500, 0), "wide": (900, 0)})
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": "Made Up", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "made-up.ttf")
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [*font_manager.fontManager.ttflist])
    font_manager.fontManager.addfont(tmp_path / "made-up.ttf")
    html._families.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a missing glyph is a warning
        shown = plot(lambda canvas: canvas.text(0.5, 0.5, "text 漢"), "", 1.0)
        answer = text_image(["漢漢", "漢"], "#ff0000", 100, 20)
    assert shown.png and answer.size == (100, 20 * 2)
    red = (np.asarray(answer) != 255).any(-1)
    assert red[20:, 20:].sum() == 0 and red[:20, 20:].sum() > 50 and red[20:].sum() > 50
    html._families.cache_clear()


def test_page_may_load_files_beside_it_and_nothing_else():
    chart = html.Figure(b"png", "a figure")
    sections = [html.Section("s", figures=[chart], id='x"y')]
    text = html.page("t", sections, scripts=["a.js"], stylesheets=["a.css"], address=lambda png: f"{png.decode()}.png")
    assert '<script src="a.js" defer></script>' in text and '<link rel="stylesheet" href="a.css">' in text
    assert '<img src="png.png"' in text and '<div id="x&#34;y"></div>' in text and "data:image" not in text
    assert "default-src 'none'; script-src &#39;self&#39; file:;" in text
    assert "script-src &#39;none&#39;" in html.page("t", [])
