"""Examples as the model gets them: the resized image with its patches, the tokens, and what the loss sees in colour.

Everything is drawn from the ``Example`` that training makes of the record, not from the record: what is wrong with a
template, a mask or an image shows here.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image, ImageDraw

from phivision_jax.data.feed.encode import encode_record
from phivision_jax.data.quarantine import BadRecord
from phivision_jax.data.records import MODES, TASKS
from phivision_jax.data.view.drawing import LINE, MARGIN, PAPER, SOFT, WIDTH, Run, draw_runs, shortened, stacked
from phivision_jax.images.layout import PatchedImage
from phivision_jax.rows import Example
from phivision_jax.text.constants import IGNORE

if TYPE_CHECKING:
    from phivision_jax.data.store.dataset import Dataset
    from phivision_jax.processor import Processor
    from phivision_jax.text.tokenizer import Tokenizer

MOST_TOKENS = 240
"""Of a stretch of text of one kind; a longer one is shortened in the middle."""
LEARNED, LEARNED_PAPER = "#0a5c2b", "#d3f2dc"
CONTEXT, CONTROL, IMAGE, CUT = "#5b626b", "#a9afb7", "#0072b2", "#c2410c"
_LEFT, _GAP = 520, 28
_PLACEHOLDER = "▢"

type Kind = Literal["context", "learned", "image", "cut"]


@dataclasses.dataclass(frozen=True)
class Piece:
    """A stretch of columns of one kind."""

    kind: Kind
    """"learned": the loss looks at it; "context": it does not; "image": an image's columns; "cut": left out here."""
    text: str
    columns: int


def pieces(example: Example, tokenizer: Tokenizer, most: int = MOST_TOKENS) -> list[Piece]:
    """The columns of an example in order, as text; stretches of more than ``most`` tokens lose their middle."""
    tokens, seen = example.tokens, example.labels != IGNORE
    kinds = np.where(seen, 1, 0)
    for number, (start, image) in enumerate(zip(example.image_starts, example.images, strict=True)):
        kinds[start : start + len(image.patches)] = 2 + number
    bounds = np.concatenate([[0], np.flatnonzero(np.diff(kinds)) + 1, [len(kinds)]]).tolist()
    found: list[Piece] = []
    for start, stop in itertools.pairwise(bounds):
        columns, kind = stop - start, int(kinds[start])
        if kind >= 2:
            found.append(Piece("image", f"image {kind - 1} {_PLACEHOLDER}×{columns:,}", columns))
            continue
        name: Kind = "learned" if kind == 1 else "context"
        if columns <= most:
            found.append(Piece(name, tokenizer.decode(tokens[start:stop], skip_special=False), columns))
            continue
        head, tail = most // 2, most - most // 2
        found.append(Piece(name, tokenizer.decode(tokens[start : start + head], skip_special=False), head))
        found.append(Piece("cut", f" … {columns - most:,} tokens … ", columns - most))
        found.append(Piece(name, tokenizer.decode(tokens[stop - tail : stop], skip_special=False), tail))
    return found


def picture(image: PatchedImage, patch_size: int) -> Image.Image:
    """The pixels behind an image's patches."""
    rows, columns = image.grid
    tiles = image.patches.reshape(rows, columns, patch_size, patch_size, 3).swapaxes(1, 2)
    return Image.fromarray(np.ascontiguousarray(tiles).reshape(rows * patch_size, columns * patch_size, 3))


def examples_sheet(dataset: Dataset, processor: Processor, records: Sequence[int], path: str | Path) -> None:
    """A PNG with the examples below each other.

    Args:
      dataset: holds them.
      processor: of the model.
      records: their numbers in the dataset.
      path: of the PNG.

    Raises:
      ValueError: when no record is named.
      IndexError: for a number that the dataset does not have.
    """
    if not records:
        raise ValueError("name at least one record to show")
    stacked([_legend(), *(_card(dataset, processor, i) for i in records)], path)


def _legend() -> Image.Image:
    runs = [
        Run("the loss sees this", LEARNED, LEARNED_PAPER),
        Run("   the model reads this, the loss does not", CONTEXT),
        Run("   <|control token|>", CONTROL),
        Run(f"   image k {_PLACEHOLDER}×n", IMAGE, bold=True),
        Run(" its n columns: one per patch", SOFT),
        Run("   … left out here …", CUT),
    ]
    block = Image.new("RGB", (WIDTH, 26), PAPER)
    draw_runs(ImageDraw.Draw(block), (MARGIN, 2), WIDTH - 2 * MARGIN, runs)
    return block


def _card(dataset: Dataset, processor: Processor, i: int) -> Image.Image:
    record = dataset[i]
    index = dataset.index
    title = [
        Run(shortened(record.id, 70), bold=True),
        Run(f"   record {i:,} of {dataset.directory.name}", SOFT),
        Run(f"   {MODES[index.modes[i]]} / {TASKS[index.tasks[i]]}", IMAGE),
    ]
    try:
        example = encode_record(record, processor)
    except BadRecord as error:
        body = [Run(f"cannot be trained on ({error.reason}): {error}", CUT)]
        return _laid_out(title, "it leaves a hole in its row", body, [])
    text = len(example.tokens) - example.num_patches
    learned = int((example.labels != IGNORE).sum())
    numbers = f"{text:,} text tokens + {example.num_patches:,} patches = {len(example.tokens):,} columns; "
    numbers += f"the loss sees {learned:,}"
    columns = 1 if len(example.images) <= 2 else 2
    width = (_LEFT - (columns - 1) * 12) // columns
    pictures = [
        _framed(image, processor.config.vision.patch_size, size, number, width)
        for number, (image, size) in enumerate(zip(example.images, index.sizes_of(i), strict=True), 1)
    ]
    return _laid_out(title, numbers, _styled(pieces(example, processor.tokenizer), processor.tokenizer), pictures)


def _laid_out(title: list[Run], numbers: str, body: list[Run], pictures: list[Image.Image]) -> Image.Image:
    left = MARGIN + (_LEFT + _GAP if pictures else 0)
    width = WIDTH - left - MARGIN
    head = draw_runs(None, (0, 0), width, title, 16) + draw_runs(None, (0, 0), width, [Run(numbers)], 14) + 10
    places, beneath = _places(pictures)
    block = Image.new("RGB", (WIDTH, max(head + draw_runs(None, (0, 0), width, body), beneath)), PAPER)
    draw = ImageDraw.Draw(block)
    y = draw_runs(draw, (left, 0), width, title, 16)
    draw_runs(draw, (left, y), width, [Run(numbers, SOFT)], 14)
    draw_runs(draw, (left, head), width, body)
    for image, place in zip(pictures, places, strict=True):
        block.paste(image, place)
    return block


def _places(pictures: list[Image.Image]) -> tuple[list[tuple[int, int]], int]:
    """Where each picture stands, in columns filled from the top, and where the lowest ends."""
    if not pictures:
        return [], 0
    heights = [0] * max(1, _LEFT // pictures[0].width)
    places = []
    for image in pictures:
        column = heights.index(min(heights))
        places.append((MARGIN + column * (image.width + 12), heights[column]))
        heights[column] += image.height + 12
    return places, max(heights)


def _framed(image: PatchedImage, patch_size: int, size: tuple[int, int], number: int, width: int) -> Image.Image:
    """One image within ``width`` pixels, its patch grid over it and its numbers below."""
    pixels = picture(image, patch_size)
    rows, columns = image.grid
    scale = min(width / pixels.width, 460 / pixels.height)
    shown = max(1, round(pixels.width * scale)), max(1, round(pixels.height * scale))
    smooth = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
    drawn = pixels.resize(shown, smooth)
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, 1000, 100_000) if n * shown[0] / columns >= 5)
    lines = Image.new("RGBA", shown)
    draw = ImageDraw.Draw(lines)
    for count, extent, across in ((columns, shown[0], False), (rows, shown[1], True)):
        for k in range(0, count + 1, every):
            at = min(round(k * extent / count), extent - 1)
            draw.line((0, at, shown[0], at) if across else (at, 0, at, shown[1]), fill=(255, 255, 255, 110))
    drawn = Image.alpha_composite(drawn.convert("RGBA"), lines).convert("RGB")
    resized = "" if size == pixels.size else f" → {pixels.width}×{pixels.height}"
    caption = f"image {number}: {size[0]}×{size[1]}{resized} px\n{columns} × {rows} = {rows * columns:,} patches"
    if every > 1:
        caption += f", lines: 1 in {every}"
    runs = [Run(caption, SOFT)]
    framed = Image.new("RGB", (width, shown[1] + 6 + draw_runs(None, (0, 0), width, runs, 13)), PAPER)
    framed.paste(drawn, (0, 0))
    draw = ImageDraw.Draw(framed)
    draw.rectangle((0, 0, shown[0] - 1, shown[1] - 1), outline=LINE)
    draw_runs(draw, (0, shown[1] + 6), width, runs, 13)
    return framed


def _styled(found: Sequence[Piece], tokenizer: Tokenizer) -> list[Run]:
    """Colours; a line break is shown and made; a turn begins a new line."""
    control = re.compile("(" + "|".join(re.escape(token) for token in tokenizer.control_tokens) + ")")
    runs: list[Run] = []
    for piece in found:
        if piece.kind == "image":
            runs.append(Run(f" {piece.text} ", IMAGE, bold=True))
        elif piece.kind == "cut":
            runs.append(Run(piece.text, CUT))
        else:
            learned = piece.kind == "learned"
            text = piece.text.replace("\n", "↵\n")
            for part in control.split(text):
                if not part:
                    continue
                if part == "<|im_start|>" and runs:
                    part = "\n" + part
                colour = LEARNED if learned else CONTROL if control.fullmatch(part.strip()) else CONTEXT
                runs.append(Run(part, colour, LEARNED_PAPER if learned else None))
    return runs
