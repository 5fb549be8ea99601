"""Boxes and points in an answer, in pixels of the image that it is about.

    text      "The cup: [0.125, 0.250, 0.500, 0.750], its handle [0.5, 0.5]"     the released format, relative to 1
    find      Mark((80, 120, 320, 360), "The cup"), Mark((320, 240), "its handle")  on an image of 640 x 480 pixels

An answer does not name the image that its numbers refer to; callers decide (``inference.display``: the last one).
"""

import dataclasses
import re
from collections.abc import Sequence

from PIL import Image, ImageColor, ImageDraw, ImageFont

from phivision_jax.images.decode import to_rgb

TOLERANCE = 0.02
"""Numbers this far outside [0, 1] are clipped, as rounding may cause them; lists with others are text."""
COLOURS = ("#e0322f", "#1769e0", "#1a9641", "#e8850c", "#8e3fbf", "#00a5b5", "#d6338a", "#8a6d1b")
"""Colours of marks, in this order, repeated."""
_LIST = re.compile(r"\[([^][]*)\]")
_TAG = re.compile(r"</?[\w|]+>")
_BESIDE_LABEL = re.compile(r"^(?:[\W_]|\d+[.)]|(?:and|or)\b)+|[\W_]+$")


@dataclasses.dataclass(frozen=True)
class Mark:
    """A box or a point that a text names."""

    xy: tuple[float, ...]
    """left, top, right, bottom of a box, or x, y of a point, in pixels; edges of the image are 0 and its size."""
    label: str
    """The words before it on its line, if they are few; else empty."""
    span: tuple[int, int]
    """First character of its list in the text, and the one after the last."""


def find(text: str, size: tuple[int, int]) -> list[Mark]:
    """Find boxes ``[x1, y1, x2, y2]`` and points ``[x, y]`` with coordinates relative to 1.

    A list of another length, with other numbers, with swapped corners, or of two integers (``[0, 1]`` is an interval)
    is text. The marks of the beginning of a text are the first marks of the complete text, so it may be streamed.

    Args:
      text: an answer without its thought, which may have other boxes.
      size: width and height of the image in pixels.
    """
    marks: list[Mark] = []
    for match in _LIST.finditer(text):
        try:
            shares = [float(number) for number in match[1].split(",")]
        except ValueError:
            continue
        inside = all(-TOLERANCE <= share <= 1 + TOLERANCE for share in shares)
        ordered = len(shares) == 4 and shares[0] <= shares[2] and shares[1] <= shares[3]
        if inside and (ordered or (len(shares) == 2 and "." in match[1])):
            pixels = [min(max(share, 0.0), 1.0) * size[i % 2] for i, share in enumerate(shares)]
            start = max(marks[-1].span[1] if marks else 0, text.rfind("\n", 0, match.start()) + 1)
            marks.append(Mark(tuple(pixels), _label(text[start : match.start()]), match.span()))
    return marks


def _label(before: str) -> str:
    """The text between the previous mark, or the line's beginning, and a mark, if it looks like a name."""
    label = _BESIDE_LABEL.sub("", _TAG.sub("", before))
    return label if len(label) <= 40 and len(label.split()) <= 6 and "{" not in before else ""


def draw(image: Image.Image, marks: Sequence[Mark]) -> Image.Image:
    """Draw marks on an image: outlines of boxes, circles around points, and labels.

    Lines and letters grow with the image, and labels are left out of images that are too small for them. To enlarge or
    to shrink an image, do so before, and ``find`` the marks with its new size.

    Returns:
      A new RGB image of the same size.
    """
    shown = to_rgb(image).copy()
    side = (image.width * image.height) ** 0.5
    line, letters = max(round(side / 180), 1), max(round(side / 36), 10)
    canvas, font = ImageDraw.Draw(shown), ImageFont.load_default(letters)
    for i, mark in enumerate(marks):
        colour, radius = COLOURS[i % len(COLOURS)], 3 * line
        # The last pixel of a box is the one before its edge.
        corners = [min(max(round(x), 0), image.size[k % 2] - 1) for k, x in enumerate(mark.xy)]
        x, y, *_ = corners
        shape, box = canvas.rectangle, corners
        if len(corners) == 2:
            shape, box = canvas.ellipse, [x - radius, y - radius, x + radius, y + radius]
        if line > 1:  # a white rim, for images of the same colour
            shape(
                [b + (-line // 2 if k < 2 else line // 2) for k, b in enumerate(box)], outline="white", width=2 * line
            )
        shape(box, outline=colour, width=line)
        latin = all(ord(letter) < 0x250 for letter in mark.label)  # the font has no other letters
        label = mark.label if latin and mark.label else f"{i + 1}" if len(marks) > 1 else ""
        _, _, width, height = canvas.textbbox((0, 0), label, font)
        width, height = width + 2 * line, height + 2 * line
        if label and width <= image.width and height <= image.height / 4:
            left, top = min(box[0], image.width - width), box[1] - height
            left, top = max(left, 0), top if top >= 0 else min(max(box[1], 0), image.height - height)
            canvas.rectangle([left, top, left + width - 1, top + height - 1], fill=colour)
            canvas.text((left + line, top + line), label, ImageColor.getrgb("white"), font)
    return shown


def fit(image: Image.Image, answer: str, width: int, height: int) -> Image.Image:
    """Scale an image to fit so many pixels, and draw the marks of an answer on it.

    Small images are enlarged by an integer, so that their pixels stay sharp.
    """
    scale = min(width / image.width, height / image.height)
    scale = int(scale) if scale >= 2 else scale
    size = max(round(image.width * scale), 1), max(round(image.height * scale), 1)
    scaled = to_rgb(image).resize(size, Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS)
    return draw(scaled, find(answer, size))
