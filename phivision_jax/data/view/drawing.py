"""Text on pictures, for ``show`` and ``show_rows``: Pillow, with the fonts that matplotlib brings."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

WIDTH, MARGIN = 1400, 24
"""Pixels."""
INK, SOFT, LINE, PAPER = "#1b1f24", "#7a818a", "#d5d8dd", "#ffffff"


@functools.cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


@dataclasses.dataclass(frozen=True)
class Run:
    """Some text in one style; a line break in it breaks the line."""

    text: str
    colour: str = INK
    background: str | None = None
    bold: bool = False


def draw_runs(
    draw: ImageDraw.ImageDraw | None, at: tuple[int, int], width: int, runs: Iterable[Run], size: int = 15
) -> int:
    """Set text in lines of at most ``width`` pixels, broken at spaces, within a word where it must be.

    Args:
      draw: None only measures.
      at: left and top.
      width: of the block.
      runs: set one after the other.
      size: of the font; lines are 1.45 times as high.

    Returns:
      the height.
    """
    left, top = at
    height = round(size * 1.45)
    x, y = 0, 0
    for run in runs:
        face = font(size, run.bold)
        for i, line in enumerate(run.text.split("\n")):
            if i:
                x, y = 0, y + height
            for word in _words(line):
                for piece in _fitting(word, face, width):
                    advance = round(face.getlength(piece))
                    if x and x + round(face.getlength(piece.rstrip())) > width:
                        x, y = 0, y + height
                    if draw is not None:
                        if run.background:
                            box = (left + x, top + y, left + x + advance, top + y + height - 2)
                            draw.rectangle(box, fill=run.background)
                        draw.text((left + x, top + y), piece, font=face, fill=run.colour)
                    x += advance
    return y + height


def _words(line: str) -> list[str]:
    """Words, each with the spaces that follow it."""
    words, start = [], 0
    for i in range(1, len(line)):
        if line[i] != " " and line[i - 1] == " ":
            words.append(line[start:i])
            start = i
    return [*words, line[start:]] if line else []


def _fitting(word: str, face: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """The word, cut where it is wider than a line."""
    pieces = []
    while face.getlength(word.rstrip()) > width and len(word) > 1:
        cut = max(1, int(len(word) * width / face.getlength(word)))
        while cut > 1 and face.getlength(word[:cut]) > width:
            cut -= 1
        pieces.append(word[:cut])
        word = word[cut:]
    return [*pieces, word]


def shortened(text: str, most: int) -> str:
    """At most ``most`` characters, the middle left out visibly."""
    if len(text) <= most:
        return text
    return f"{text[: (most - 1) // 2]}…{text[len(text) - most // 2 :]}"


def stacked(blocks: Sequence[Image.Image], path: str | Path) -> None:
    """Blocks of ``WIDTH`` below each other, a line between them, as a PNG."""
    gap = 2 * MARGIN
    height = sum(block.height for block in blocks) + gap * (len(blocks) - 1) + 2 * MARGIN
    sheet = Image.new("RGB", (WIDTH, height), PAPER)
    draw, y = ImageDraw.Draw(sheet), MARGIN
    for i, block in enumerate(blocks):
        if i:
            draw.line((0, y + gap // 2, WIDTH, y + gap // 2), fill=LINE, width=2)
            y += gap
        sheet.paste(block, (0, y))
        y += block.height
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, "PNG")
