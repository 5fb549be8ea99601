"""Packed rows as the model gets them: which example owns each column, which image each patch.

    columns   |▨▨▨▨ 1 ▨▨▨▨▇▇▇▇|▨▨ 2 ▨▨▇▇▇|▇▇▇ 3 ▇▇▇|      |     one colour per example; hatched: image columns
    loss               ▂▂▂        ▂▂     ▂▂▂                    what is learned
    patches   |▨▨▨▨ 1 ▨▨▨▨|▨▨ 2 ▨▨|                       |     each vision row

Everything is read off the ``Batch`` that training gets (``pipeline.batches``), holes included.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageColor, ImageDraw

from phivision_jax.batch import Batch
from phivision_jax.data.feed.pipeline import BatchInfo, batches
from phivision_jax.data.plan.plan import Plan
from phivision_jax.data.records import MODES, TASKS
from phivision_jax.data.view.drawing import (
    INK,
    LINE,
    MARGIN,
    PAPER,
    SOFT,
    WIDTH,
    Run,
    draw_runs,
    font,
    shortened,
    stacked,
)

if TYPE_CHECKING:
    from phivision_jax.data.store.dataset import Dataset
    from phivision_jax.processor import Processor

# Neighbours in a row are neighbours here: no two alike.
COLOURS = (
    "#4477aa", "#ee8866", "#44bb99", "#ddaa33", "#aa4499", "#99ddff",
    "#bbcc33", "#ee99aa", "#7a6fac", "#c2a383", "#77aadd", "#aaaa00",
)  # fmt: skip
LOSS = "#0a5c2b"
_LABEL = 84
STRIP_LEFT, STRIP_WIDTH = MARGIN + _LABEL, WIDTH - 2 * MARGIN - _LABEL
"""Where the strips lie: column c of T begins at ``STRIP_LEFT + round(c · STRIP_WIDTH / T)``."""
_STRIP, _LOSS = 44, 10


@dataclasses.dataclass(frozen=True)
class ImageSpan:
    """An image in a row."""

    segment: int
    """Of the example that owns it, from 1."""
    number: int
    """Within the example, from 1."""
    columns: tuple[int, int]
    """[first, last + 1) of T."""
    vision_row: int
    patches: tuple[int, int]
    """[first, last + 1) of P."""


@dataclasses.dataclass(frozen=True)
class RowLayout:
    """Who owns what in one row of a batch."""

    segments: tuple[tuple[int, int], ...]
    """Columns [first, last + 1) of each example, in order."""
    images: tuple[ImageSpan, ...]
    loss: np.ndarray
    """[T] bool: the column is learned from."""
    patches_used: int

    @property
    def columns_used(self) -> int:
        return sum(stop - start for start, stop in self.segments)


def layout(batch: Batch, b: int) -> RowLayout:
    """Read row ``b`` of a batch (NumPy)."""
    segment, index = batch.segment_ids[b], batch.vision_index[b]
    owner = batch.patch_segments[b]
    num_patches = max(owner.shape[1], 1)
    spans = []
    for number in range(1, int(segment.max(initial=0)) + 1):
        columns = np.flatnonzero(segment == number)
        spans.append((int(columns[0]), int(columns[-1]) + 1))
    # An image is a stretch of columns whose patches are of one image of one vision row.
    at = np.maximum(index, 0)
    image = np.where(index >= 0, np.append(owner, 0)[at], 0)
    key = np.stack([at // num_patches, image])
    bounds = np.concatenate([[0], np.flatnonzero((np.diff(key) != 0).any(axis=0)) + 1, [key.shape[1]]]).tolist()
    images: list[ImageSpan] = []
    for start, stop in itertools.pairwise(bounds):
        if index[start] >= 0:
            of, first = int(segment[start]), int(index[start]) % num_patches
            number = 1 + sum(span.segment == of for span in images)
            patches = (first, first + stop - start)
            images.append(ImageSpan(of, number, (start, stop), int(index[start]) // num_patches, patches))
    return RowLayout(tuple(spans), tuple(images), batch.loss_weights[b] > 0, int((owner > 0).sum()))


def rows_sheet(
    plan: Plan, datasets: Sequence[Dataset], processor: Processor, rows: Sequence[int], path: str | Path
) -> None:
    """A PNG with rows of a plan below each other.

    Args:
      plan: says what is in the rows.
      datasets: what it was made from, in its order.
      processor: that it was made with.
      rows: their numbers in the plan.
      path: of the PNG.

    Raises:
      ValueError: when no row is named; as ``pipeline.batches``.
      IndexError: for a row that the plan does not have.
    """
    if not rows:
        raise ValueError("name at least one row to show")
    blocks = []
    for row in rows:
        if not 0 <= row < plan.num_rows:
            raise IndexError(f"row {row} of a plan with {plan.num_rows:,} rows")
        batch, info = next(batches(datasets, plan, processor, batch_rows=1, start_step=row, num_threads=0))
        blocks.append(_block(plan, datasets, row, batch, info))
    stacked([_legend(), *blocks], path)


def _legend() -> Image.Image:
    block = Image.new("RGB", (WIDTH, 26), PAPER)
    draw = ImageDraw.Draw(block)
    x = MARGIN
    for what, label in (
        ("text", "text columns"),
        ("image", "image columns, patches"),
        ("loss", "the loss sees the next token"),
    ):
        if what == "loss":
            draw.rectangle((x, 10, x + 34, 10 + _LOSS), fill=LOSS)
        else:
            _bar(block, (x, 3, x + 34, 22), COLOURS[0], hatched=what == "image")
        draw.text((x + 42, 3), label, font=font(15), fill=SOFT)
        x += 42 + round(font(15).getlength(label)) + 30
    _padding(draw, (x, 3, x + 34, 22))
    draw.text((x + 42, 3), "padding          one colour per example; 2.1 is the first image of example 2",
              font=font(15), fill=SOFT)  # fmt: skip
    return block


def _block(plan: Plan, datasets: Sequence[Dataset], row: int, batch: Batch, info: BatchInfo) -> Image.Image:
    found, capacity = layout(batch, 0), plan.row_shape
    total = capacity.total_patches
    columns, patches = found.columns_used, found.patches_used
    numbers = [
        f"{len(found.segments)} example{'' if len(found.segments) == 1 else 's'}",
        f"{columns:,} of {capacity.length:,} columns ({1 - columns / capacity.length:.1%} padding)",
        f"{patches:,} of {total:,} patches ({1 - patches / max(total, 1):.1%} padding)",
    ]
    title = [Run(f"row {row:,}", bold=True), Run("   " + "   ".join(numbers), SOFT)]
    names = _names(plan, datasets, row, found, info)
    half = (WIDTH - 2 * MARGIN) // 2
    heights = [draw_runs(None, (0, 0), half - 40, runs, 13) for runs in names]
    lines = [max(heights[i : i + 2]) for i in range(0, len(heights), 2)]
    below = 34 + _STRIP + _LOSS + 24 + capacity.vision_rows * (_STRIP + 8) + 12
    block = Image.new("RGB", (WIDTH, below + sum(lines)), PAPER)
    draw = ImageDraw.Draw(block)
    draw_runs(draw, (MARGIN, 0), WIDTH - 2 * MARGIN, title, 16)
    _columns(block, draw, 34, found, capacity.length)
    y = 34 + _STRIP + _LOSS + 24
    for r in range(capacity.vision_rows):
        label = "patches" if capacity.vision_rows == 1 else f"patches {r + 1}"
        _patches(block, draw, y, [span for span in found.images if span.vision_row == r], capacity.num_patches, label)
        y += _STRIP + 8
    y += 12
    for i, runs in enumerate(names):
        left = MARGIN + (i % 2) * half
        draw.rectangle((left, y + 2, left + 24, y + 16), fill=_colour(i + 1))
        draw_runs(draw, (left + 32, y), half - 40, runs, 13)
        if i % 2 or i == len(names) - 1:
            y += lines[i // 2]
    return block


def _names(plan: Plan, datasets: Sequence[Dataset], row: int, found: RowLayout, info: BatchInfo) -> list[list[Run]]:
    """What each example is, for the list below the strips."""
    holes = {hole.id: hole.reason for hole in info.holes}
    names = []
    for segment, ((source, record), span) in enumerate(
        zip(plan.rows(row, 1)[0].tolist(), found.segments, strict=True), 1
    ):
        own, index = info.record_ids[0][segment - 1], datasets[source].index
        patches = sum(s.patches[1] - s.patches[0] for s in found.images if s.segment == segment)
        runs = [
            Run(f"{segment}  ", bold=True),
            Run(shortened(own, 40), INK),
            Run(f"  {MODES[index.modes[record]]}/{TASKS[index.tasks[record]]}", "#0072b2"),
            Run(f"  {span[1] - span[0] - patches:,} tokens" + (f" + {patches:,} patches" if patches else ""), SOFT),
        ]
        if len(datasets) > 1:
            runs.insert(2, Run(f"  {datasets[source].directory.name}", SOFT))
        if own in holes:
            runs.append(Run(f"  hole: {holes[own]}", "#c2410c"))
        names.append(runs)
    return names


def _columns(block: Image.Image, draw: ImageDraw.ImageDraw, y: int, found: RowLayout, length: int) -> None:
    draw.text((MARGIN, y + 13), "columns", font=font(14), fill=SOFT)
    _padding(draw, (STRIP_LEFT, y, STRIP_LEFT + STRIP_WIDTH - 1, y + _STRIP - 1))
    for segment, span in enumerate(found.segments, 1):
        left, right = _pixels(span, length)
        _bar(block, (left, y, right, y + _STRIP - 1), _colour(segment))
    for image in found.images:
        left, right = _pixels(image.columns, length)
        _bar(block, (left, y, right, y + _STRIP - 1), _colour(image.segment), hatched=True)
        draw.line((left, y, left, y + _STRIP - 1), fill=PAPER)
        _label(draw, (left, y, right, y + _STRIP - 1), f"{image.segment}.{image.number}")
    for segment, span in enumerate(found.segments, 1):
        left, right = _pixels(span, length)
        draw.line((left, y, left, y + _STRIP - 1), fill=PAPER)
        if not any(image.segment == segment for image in found.images):
            _label(draw, (left, y, right, y + _STRIP - 1), f"{segment}")
    draw.text((MARGIN, y + _STRIP - 2), "loss", font=font(14), fill=SOFT)
    bounds = np.concatenate([[0], np.flatnonzero(np.diff(found.loss)) + 1, [len(found.loss)]]).tolist()
    for span in itertools.pairwise(bounds):
        if found.loss[span[0]]:
            left, right = _pixels(span, length)
            draw.rectangle((left, y + _STRIP + 2, right, y + _STRIP + 1 + _LOSS), fill=LOSS)


def _patches(
    block: Image.Image, draw: ImageDraw.ImageDraw, y: int, spans: Sequence[ImageSpan], num_patches: int, label: str
) -> None:
    draw.text((MARGIN, y + 13), label, font=font(14), fill=SOFT)
    _padding(draw, (STRIP_LEFT, y, STRIP_LEFT + STRIP_WIDTH - 1, y + _STRIP - 1))
    for span in spans:
        left, right = _pixels(span.patches, num_patches)
        _bar(block, (left, y, right, y + _STRIP - 1), _colour(span.segment), hatched=True)
        draw.line((left, y, left, y + _STRIP - 1), fill=PAPER)
        _label(draw, (left, y, right, y + _STRIP - 1), f"{span.segment}.{span.number}")


def _pixels(span: tuple[int, int], length: int) -> tuple[int, int]:
    """First and last pixel of a stretch of ``length`` columns or patches; at least one."""
    left, right = (STRIP_LEFT + round(at * STRIP_WIDTH / length) for at in span)
    return left, max(left, right - 1)


def _colour(segment: int) -> str:
    return COLOURS[(segment - 1) % len(COLOURS)]


def _bar(block: Image.Image, box: tuple[int, int, int, int], colour: str, hatched: bool = False) -> None:
    """A filled box; hatched: with lighter diagonals."""
    left, top, right, bottom = box
    red, green, blue = ImageColor.getrgb(colour)[:3]
    pixels = np.empty((bottom - top + 1, right - left + 1, 3), np.uint8)
    pixels[...] = red, green, blue
    if hatched:
        y, x = np.indices(pixels.shape[:2])
        light = (x + left + y) % 8 < 3
        pixels[light] = (pixels[light] * 0.45 + 255 * 0.55).astype(np.uint8)
    block.paste(Image.fromarray(pixels), (left, top))


def _padding(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int]) -> None:
    draw.rectangle(box, fill=PAPER, outline=LINE)


def _label(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], text: str) -> None:
    """The text in the middle of the box, on a ground of its own; nothing where it has no room."""
    left, top, right, bottom = box
    wide = round(font(13, True).getlength(text)) + 8
    if wide > right - left:
        return
    x, y = (left + right - wide) // 2, (top + bottom) // 2 - 9
    draw.rounded_rectangle((x, y, x + wide, y + 18), 4, fill=PAPER)
    draw.text((x + 4, y + 1), text, font=font(13, True), fill=INK)
