"""Records as the model receives them: resized images with their patches, and the tokens that the loss sees in colour.

Everything is read from the ``Example`` that training makes of a record, not from the record, so a wrong template, mask
or image shows here.
"""

from __future__ import annotations

import itertools
import re

import numpy as np
from einops import rearrange
from PIL import Image

from phivision_jax.data.feed.encode import encode_record
from phivision_jax.data.quarantine import BadRecord
from phivision_jax.data.records import MODES, TASKS
from phivision_jax.data.store.dataset import Dataset
from phivision_jax.io.html import Figure, Section, Span, Style, image_figure
from phivision_jax.processor import Processor
from phivision_jax.rows import Example
from phivision_jax.text.constants import IGNORE
from phivision_jax.text.tokenizer import Tokenizer

MAX_TOKENS = 400
"""Longer stretches of text lose their middle."""
_MAX_WIDTH, _MAX_HEIGHT = 520, 460
"""Pixels of a shown image."""
_GRID = np.array([0, 114, 178])
"""Colour of the lines between patches: it shows on photos and on white pages."""
_PLACEHOLDER = "▢"
LEGEND = Section(
    "Legend",
    text=(
        Span("the loss sees this", "good"),
        Span("   the model reads this, the loss does not"),
        Span("   <|control token|>", "faint"),
        Span(f"   image k {_PLACEHOLDER}×n", "accent"),
        Span(" the n tokens of an image", "soft"),
        Span("   … left out here …", "warning"),
    ),
)


def spans(example: Example, tokenizer: Tokenizer, max_tokens: int = MAX_TOKENS) -> list[Span]:
    """The tokens of an example in order, as text in the styles of ``LEGEND``.

    Line breaks are visible, a turn begins a new line, and a stretch of more than ``max_tokens`` loses its middle.
    """
    kinds = np.where(example.labels != IGNORE, 1, 0)
    for k, (start, image) in enumerate(zip(example.image_starts, example.images, strict=True)):
        kinds[start : start + image.size.tokens] = 2 + k
    control = re.compile("(" + "|".join(map(re.escape, tokenizer.control_tokens)) + ")")
    found: list[Span] = []

    def add(start: int, stop: int) -> None:
        text = tokenizer.decode(example.tokens[start:stop], skip_special=False).replace("\n", "↵\n")
        for part in filter(None, control.split(text)):
            line_break = "\n" if part == "<|im_start|>" and found else ""
            context: Style = "faint" if control.fullmatch(part) else "plain"
            found.append(Span(line_break + part, "good" if kinds[start] else context))

    for start, stop in itertools.pairwise([0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(kinds)]):
        count = stop - start
        if kinds[start] >= 2:
            found.append(Span(f" image {kinds[start] - 1} {_PLACEHOLDER}×{count:,} ", "accent"))
        elif count <= max_tokens:
            add(start, stop)
        else:
            head = max_tokens // 2
            add(start, start + head)
            found.append(Span(f" … {count - max_tokens:,} tokens … ", "warning"))
            add(stop - max_tokens + head, stop)
    return found


def pixels(tile: np.ndarray, patch_size: int) -> np.ndarray:
    """[H, W, 3] u8: the pixels of a tile [rows, columns, patch²·3] (``PatchedImage.tiles``)."""
    return rearrange(tile, "h w (p q c) -> (h p) (w q) c", p=patch_size, q=patch_size)


def record_section(dataset: Dataset, processor: Processor, i: int) -> Section:
    """Record ``i``: its images with their patches, its numbers, and its text with the loss in colour.

    A record that cannot be encoded shows the reason instead.

    Raises:
      IndexError: when the dataset has no such record.
    """
    record, index = dataset[i], dataset.index
    note = f"record {i:,} of {dataset.directory.name} · {MODES[index.modes[i]]} / {TASKS[index.tasks[i]]} · "
    try:
        example = encode_record(record, processor)
    except BadRecord as error:
        text = [Span(f"cannot be encoded ({error.reason}): {error}", "warning")]
        return Section(record.id, note + "a placeholder takes its place in a row", text=text)
    image_tokens = len(example.tokens) - example.text_tokens
    note += (
        f"{example.text_tokens:,} text tokens + {image_tokens:,} image tokens = "
        f"{len(example.tokens):,}; {example.num_patches:,} patches; the loss sees {(example.labels != IGNORE).sum():,}"
    )
    figures = [
        _tile_figure(tile, processor.config.vision.patch_size, size, f"image {k}" + (f", tile {t}" if t > 1 else ""))
        for k, (image, size) in enumerate(zip(example.images, index.sizes_of(i), strict=True), 1)
        for t, tile in enumerate(image.tiles, 1)
    ]
    return Section(record.id, note, figures, text=spans(example, processor.tokenizer))


def _tile_figure(tile: np.ndarray, patch_size: int, original: tuple[int, int], name: str) -> Figure:
    """One tile of an image scaled for the page, the grid of its patches over it and its sizes below."""
    resized = Image.fromarray(pixels(tile, patch_size))
    rows, columns = tile.shape[:2]
    scale = min(_MAX_WIDTH / resized.width, _MAX_HEIGHT / resized.height)
    width, height = (max(1, round(side * scale)) for side in resized.size)
    smooth = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
    shown = np.asarray(resized.resize((width, height), smooth)).copy()
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, 1000, 100_000) if n * width / columns >= 8)
    x, y = (
        np.minimum(np.round(np.arange(0, n + 1, every) * side / n).astype(int), side - 1)
        for n, side in ((columns, width), (rows, height))
    )
    lines = np.zeros((height, width, 1), bool)
    lines[y], lines[:, x] = True, True
    shown = np.where(lines, shown * 0.5 + _GRID * 0.5, shown).astype(np.uint8)
    change = "" if original == resized.size else f" → {resized.width}×{resized.height}"
    caption = f"{name}: {original[0]}×{original[1]}{change} pixels\n"
    caption += f"{columns} × {rows} = {rows * columns:,} patches" + (f", lines: 1 in {every}" if every > 1 else "")
    return image_figure(Image.fromarray(shown), caption)
