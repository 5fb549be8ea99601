"""Figures of image layouts: the tiles and patches of a layout on an image, and several strategies side by side.

Scales differ in colour, and the finest has the thinnest lines; overlaps of crops are darker, and patches of the finest
scale are grey lines. A comparison has a detail below each strategy, at the resolution that the encoder sees.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import Rectangle
from PIL import Image

from phivision_jax.images.decode import to_rgb
from phivision_jax.images.layout import Box, ImageLayout
from phivision_jax.io.html import Figure, plot

SCALE_COLOURS = ("#d55e00", "#0072b2", "#009e73")
"""Colours of scales, the finest first."""
_MOST_PIXELS = 900
"""Longest side of a shown image."""
_PATCH_LINE: dict[str, Any] = {"color": "#555555", "linewidth": 0.35, "alpha": 0.5}


class Cost(NamedTuple):
    """Numbers of one image in one layout."""

    tokens: int
    patches: int
    tiles: int
    resized: tuple[int, int]
    """Width and height in pixels at the finest scale."""
    stretch: float
    """Change of the aspect ratio, at least 1."""
    pixels_per_token: float
    """Pixels of the image as given."""

    @classmethod
    def measure(cls, layout: ImageLayout, width: int, height: int) -> "Cost":
        size, resized = layout.measure(width, height), layout.resized(width, height)
        change = resized[0] * height / (resized[1] * width)
        per_token = width * height / size.tokens
        return cls(size.tokens, size.patches, len(size.grids), resized, max(change, 1 / change), per_token)

    def __str__(self) -> str:
        across = math.sqrt(self.pixels_per_token)
        tiles = f" in {self.tiles} tiles" if self.tiles > 1 else ""
        stretch = f"stretched by {self.stretch - 1:.1%}" if self.stretch >= 1.0005 else "not distorted"
        return (
            f"{self.tokens:,} tokens, {self.patches:,} patches{tiles}\n"
            f"resized to {self.resized[0]:,}×{self.resized[1]:,}, {stretch}\n"
            f"{self.pixels_per_token:,.0f} pixels per token ({across:.0f}×{across:.0f} of the image)"
        )


def layout_figure(image: Image.Image, layout: ImageLayout, name: str) -> Figure:
    """An image with the tiles of each scale, and its numbers below."""
    width, height = image.size
    scales = _scales(layout, width, height)

    def draw(canvas: Canvas) -> None:
        axes = np.atleast_1d(canvas.subplots(1, len(scales)))
        for i, (ax, boxes) in enumerate(zip(axes, reversed(scales), strict=True)):
            finest = i == len(scales) - 1
            _show(ax, image)
            _outline(ax, boxes, SCALE_COLOURS[(len(scales) - 1 - i) % 3], 1.5, fill=True)
            if finest:
                _patch_lines(ax, layout, boxes, (0, 0, width, height), 1400 / len(scales))
            count = f"{len(boxes)} tile{'s' * (len(boxes) > 1)}"
            ax.set_title(f"{count}, with patches" if finest else count)

    inches = min(6.0, 13.0 / len(scales) * height / width)
    return plot(
        draw, f"{name}: {width}×{height} pixels, {layout.name}\n{Cost.measure(layout, width, height)}", inches + 0.5
    )


def comparison(image: Image.Image, layouts: Sequence[tuple[str, ImageLayout]], detail: Box | None = None) -> Figure:
    """Strategies side by side: the tiles of each on the image, and a detail as its encoder sees it.

    Args:
      image: any Pillow image.
      layouts: titles and layouts, at least one.
      detail: part of the image to enlarge; default: a square with much contrast.
    """
    detail = detail or _busiest(image)
    count, (width, height) = len(layouts), image.size
    panel = 13.4 / count
    upper = min(6.0, panel * height / width)

    def draw(canvas: Canvas) -> None:
        axes = np.reshape(canvas.subplots(2, count, height_ratios=(upper, panel)), (2, count))
        for (title, layout), above, below in zip(layouts, *axes, strict=True):
            _show(above, image)
            scales = _scales(layout, width, height)
            for i, boxes in reversed([*enumerate(scales)]):
                _outline(above, boxes, SCALE_COLOURS[i % 3], 1.2 + 1.6 * i, fill=i == 0)
            _patch_lines(above, layout, scales[0], (0, 0, width, height), 1400 / count)
            _outline(above, [detail], "black", 1.8)
            above.set_title(f"{title}\n{Cost.measure(layout, width, height)}", fontsize=7.5)
            _show_detail(below, image, layout, detail)
            _outline(below, scales[0], SCALE_COLOURS[0], 1.5)
            _patch_lines(below, layout, scales[0], detail, math.inf)
            below.set(xlim=detail[::2], ylim=detail[3:0:-2])

        legend = "tiles of the finest scale orange, of coarser ones blue and green, overlaps darker; grey: patches"
        canvas.supxlabel(f"{legend}. Below: the black square at the resolution that the encoder sees", fontsize=8)

    return plot(draw, f"{width}×{height} pixels", upper + panel + 1.0)


def _scales(layout: ImageLayout, width: int, height: int) -> list[list[Box]]:
    """Boxes of the tiles grouped by the scale that they belong to, the finest first."""

    def fineness(box: Box) -> float:
        return round(math.log((box[2] - box[0]) * (box[3] - box[1])), 2)

    ordered = sorted(layout.boxes(width, height), key=fineness)
    return [list(group) for _, group in itertools.groupby(ordered, fineness)]


def _show(axes: Axes, image: Image.Image) -> None:
    shown = to_rgb(image)
    if (factor := max(shown.size) / _MOST_PIXELS) > 1:
        shown = shown.resize([max(1, round(side / factor)) for side in shown.size], Image.Resampling.LANCZOS)
    axes.imshow(np.asarray(shown), extent=(0, image.width, image.height, 0))
    axes.set(xlim=(0, image.width), ylim=(image.height, 0), xticks=[], yticks=[])


def _show_detail(axes: Axes, image: Image.Image, layout: ImageLayout, detail: Box) -> None:
    width, height = layout.resized(*image.size)
    scale_x, scale_y = width / image.width, height / image.height
    size = (max(1, round((detail[2] - detail[0]) * scale_x)), max(1, round((detail[3] - detail[1]) * scale_y)))
    part = to_rgb(image).resize(size, Image.Resampling.BICUBIC, detail)
    axes.imshow(np.asarray(part), extent=(detail[0], detail[2], detail[3], detail[1]), interpolation="nearest")
    axes.set(xticks=[], yticks=[])


def _outline(axes: Axes, boxes: Sequence[Box], colour: str, line: float, fill: bool = False) -> None:
    for left, top, right, bottom in boxes:
        place = (left, top), right - left, bottom - top
        if fill and len(boxes) > 1:
            axes.add_patch(Rectangle(*place, facecolor=colour, alpha=0.13, linewidth=0))
        axes.add_patch(Rectangle(*place, fill=False, edgecolor=colour, linewidth=line))


def _patch_lines(axes: Axes, layout: ImageLayout, boxes: Sequence[Box], within: Box, pixels: float) -> None:
    """Every n-th line between patches, so that 10 of the panel's pixels are between them."""
    grids = layout.measure(1, 1).grids if len(boxes) > 1 else layout.measure(*map(round, boxes[0][2:])).grids
    rows, columns = grids[-1]
    for box in boxes:
        for count, low, high, line in ((columns, 0, 2, axes.vlines), (rows, 1, 3, axes.hlines)):
            length = (box[high] - box[low]) / (within[high] - within[low]) * pixels
            every = next(n for n in (1, 2, 4, 8, 16, 32, 10_000) if n * length / count >= 10)
            places = np.linspace(box[low], box[high], count + 1)[::every]
            line(places, box[1 - low], box[3 - low], **_PATCH_LINE)


def _busiest(image: Image.Image) -> Box:
    """A square of a sixth of the longer side, where neighbouring pixels differ most."""
    side = max(1, min(max(image.size) // 6, *image.size))
    grey = np.asarray(to_rgb(image).convert("L"), np.float32)
    change = np.zeros_like(grey)
    change[:, 1:] += np.abs(np.diff(grey, axis=1))
    change[1:] += np.abs(np.diff(grey, axis=0))
    corners = [
        (top, left)
        for top in range(0, image.height - side + 1, max(1, side // 2))
        for left in range(0, image.width - side + 1, max(1, side // 2))
    ]
    top, left = max(
        corners, key=lambda corner: float(change[corner[0] : corner[0] + side, corner[1] : corner[1] + side].sum())
    )
    return float(left), float(top), float(left + side), float(top + side)
