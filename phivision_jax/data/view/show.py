"""Records and packed rows as the model receives them.

A record is shown with its resized images and their patches, and with the tokens that the loss sees in colour. All is
read from the ``Example`` that training makes of it, so a wrong template, mask or image shows here.

A row is shown with the example of each position and the image of each patch, read from the ``Batch`` that training gets
(``pipeline.batches``), with placeholders of failed records:

    tokens    |▨▨▨▨ 1.1 ▨▨▨▨▇▇▇▇|▨▨ 2.1 ▨▨▇▇▇|▇▇▇ 3 ▇▇▇|      |     a colour per example; hatched: image tokens
    loss                   ▂▂▂          ▂▂     ▂▂▂                positions whose target the loss sees
    patches   |▨▨▨▨▨▨ 1.1 ▨▨▨▨▨▨|▨▨ 2.1 ▨▨|                 |     a strip per vision row
"""

import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from einops import rearrange
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from PIL import Image

from phivision_jax.batch import Batch, RowShape
from phivision_jax.data.feed.encode import encode_record
from phivision_jax.data.feed.pipeline import batches
from phivision_jax.data.plan.plan import Plan
from phivision_jax.data.quarantine import BadRecord
from phivision_jax.data.records import MODES
from phivision_jax.data.store.dataset import Dataset
from phivision_jax.data.view.strategies import layout_figure
from phivision_jax.images.decode import open_image
from phivision_jax.inference.grounding import draw as draw_marks
from phivision_jax.inference.grounding import find
from phivision_jax.io.html import Figure, Section, Span, Style, Table, image_figure, plot
from phivision_jax.io.messages import shorten
from phivision_jax.processor import Processor
from phivision_jax.rows import Example
from phivision_jax.text.constants import IGNORE
from phivision_jax.text.tokenizer import NOTHINK, Tokenizer

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
        Span(f"   <|control token|>   {NOTHINK} begins an answer without thoughts", "faint"),
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

    for start, stop in _runs(kinds):
        count = stop - start
        if kinds[start] >= 2:
            found.append(Span(f" image {kinds[start] - 1} {_PLACEHOLDER}×{count:,} ", "accent"))
            continue
        head = count if count <= max_tokens else max_tokens // 2
        add(start, start + head)
        if head < count:
            found.append(Span(f" … {count - max_tokens:,} tokens … ", "warning"))
            add(stop - max_tokens + head, stop)
    return found


def pixels(tile: np.ndarray, patch_size: int) -> np.ndarray:
    """[H, W, 3] u8: the pixels of a tile [rows, columns, patch²·3] (``PatchedImage.tiles``)."""
    return rearrange(tile, "h w (p q c) -> (h p) (w q) c", p=patch_size, q=patch_size)


def record_section(dataset: Dataset, processor: Processor, i: int, strategy: bool = False) -> Section:
    """Record ``i``: its images with their patches, its numbers, and its text with the loss in colour.

    A record that cannot be encoded shows the reason instead. With ``strategy``, and for layouts of several tiles, an
    image is shown as given, with the tiles over it and the numbers of the layout.

    Raises:
      IndexError: when the dataset has no such record.
    """
    record = dataset[i]
    note = f"record {i:,} of {dataset.directory.name} · {_kind(dataset, i)} · "
    try:
        example = encode_record(record, processor)
    except BadRecord as error:
        text = [Span(f"cannot be encoded ({error.reason}): {error}", "warning")]
        return Section(record.id, note + "a placeholder takes its place in a row", text=text)
    image_tokens = len(example.tokens) - example.text_tokens
    note += f"{example.text_tokens:,} text tokens + {image_tokens:,} image tokens = {len(example.tokens):,}; "
    note += f"{example.num_patches:,} patches; the loss sees {(example.labels != IGNORE).sum():,}"
    alone = len(example.images) == 1 and len(example.images[0].tiles) == 1
    content = "\n".join(message["content"] for message in record.messages) if alone else ""
    figures = []
    for k, (image, size) in enumerate(zip(example.images, dataset.index.sizes_of(i), strict=True), 1):
        if strategy or len(image.tiles) > 1:
            figures.append(layout_figure(open_image(record.images[k - 1]), processor.layout, f"image {k}"))
        else:
            figures.append(
                _tile_figure(image.tiles[0], processor.config.vision.patch_size, size, f"image {k}", content)
            )
    return Section(record.id, note, figures, text=spans(example, processor.tokenizer))


def _tile_figure(tile: np.ndarray, patch_size: int, original: tuple[int, int], name: str, text: str) -> Figure:
    """One tile of an image scaled for the page, the grid of its patches and the text's marks over it, and its sizes."""
    resized = Image.fromarray(pixels(tile, patch_size))
    rows, columns = tile.shape[:2]
    scale = min(_MAX_WIDTH / resized.width, _MAX_HEIGHT / resized.height)
    width, height = (max(1, round(side * scale)) for side in resized.size)
    smooth = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
    shown = np.asarray(resized.resize((width, height), smooth)).copy()
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, 1000, 100_000) if n * width / columns >= 8)
    sides = ((columns, width), (rows, height))
    x, y = (np.minimum(np.round(np.arange(0, n + 1, every) * side / n).astype(int), side - 1) for n, side in sides)
    lines = np.zeros((height, width, 1), bool)
    lines[y], lines[:, x] = True, True
    shown = np.where(lines, shown * 0.5 + _GRID * 0.5, shown).astype(np.uint8)
    change = "" if original == resized.size else f" → {resized.width}×{resized.height}"
    caption = f"{name}: {original[0]}×{original[1]}{change} pixels\n"
    caption += f"{columns} × {rows} = {rows * columns:,} patches" + (f", lines: 1 in {every}" if every > 1 else "")
    marks = find(text, (width, height))
    caption += "\noutlined: boxes and points in the text" if marks else ""
    return image_figure(draw_marks(Image.fromarray(shown), marks), caption)


# ---------------------------------------------------------------------------------------------------------------------
# Rows.

COLOURS = (
    "#4477aa", "#ee8866", "#44bb99", "#ddaa33", "#aa4499", "#99ddff",
    "#bbcc33", "#ee99aa", "#7a6fac", "#c2a383", "#77aadd", "#aaaa00",
)  # fmt: skip
"""Colours of examples in a row, neighbours well apart."""
LOSS = "#d55e00"
CAPTION = "A colour per example · hatched: images (2.1: the first of example 2) · orange: loss on the next token"


class ImageSpan(NamedTuple):
    """An image in a row, or one tile of it. Spans are [first, last + 1)."""

    segment: int
    """The example that owns it, from 1."""
    number: int
    """Within the example, from 1."""
    tokens: tuple[int, int]
    """Positions within T."""
    vision_row: int
    patches: tuple[int, int]
    """Within P; empty for the merged tokens of a failed record's placeholder."""


class RowLayout(NamedTuple):
    """The owners of one row of a batch."""

    segments: tuple[tuple[int, int], ...]
    """Positions [first, last + 1) of each example, in order."""
    images: tuple[ImageSpan, ...]
    loss: np.ndarray
    """[T] bool: the loss sees the position's target."""
    num_patches: int


def layout(batch: Batch, b: int) -> RowLayout:
    """Read row ``b`` of a batch (NumPy)."""
    segment_ids, owners, index = batch.segment_ids[b], batch.patch_segments[b], batch.vision_index[b]
    num_patches = max(owners.shape[1], 1)
    # The first and last patch of each position's vision token in the flattened [R·P]; −1 without any.
    first = last = index
    if batch.merge_index is not None and batch.merge_index[b].size:
        merged = rearrange(batch.merge_index[b], "m g k -> m (g k)")[index]
        last = np.where(index >= 0, merged.max(-1), -1)
        first = np.where(last >= 0, np.where(merged < 0, owners.size, merged).min(-1), -1)
    # Images are runs of tokens whose patches belong to one tile of one vision row.
    tile = np.append(owners, 0)[first]
    images: list[ImageSpan] = []
    for start, stop in _runs(segment_ids, index >= 0, first // num_patches, tile):
        if index[start] >= 0:
            segment, row = int(segment_ids[start]), max(int(first[start]) // num_patches, 0)
            number = 1 + sum(image.segment == segment for image in images)
            low, high = int(first[start:stop].min()), int(last[start:stop].max()) + 1
            patches = max(low - row * num_patches, 0), high - row * num_patches
            images.append(ImageSpan(segment, number, (start, stop), row, patches))
    segments = tuple((start, stop) for start, stop in _runs(segment_ids) if segment_ids[start])
    return RowLayout(segments, tuple(images), batch.loss_weights[b] > 0, int((owners > 0).sum()))


def _runs(*arrays: np.ndarray) -> list[tuple[int, int]]:
    """[first, last + 1) of each run in which no array changes."""
    changes = np.any([np.diff(array) != 0 for array in arrays], axis=0)
    return list(itertools.pairwise([0, *(np.flatnonzero(changes) + 1).tolist(), len(arrays[0])]))


def row_section(plan: Plan, datasets: Sequence[Dataset], processor: Processor, row: int) -> Section:
    """One row of a plan: strips of its tokens and patches, and a table of its examples.

    Args:
      plan: decides what is in the row.
      datasets: those that it was made from, in its order.
      processor: that it was made with.
      row: number of the row in the plan.

    Raises:
      ValueError: as ``pipeline.batches``.
      IndexError: for a row that the plan does not have.
    """
    examples = plan.rows(row, 1)[0].tolist()
    batch, info = next(batches(datasets, plan, processor, batch_rows=1, start_step=row, num_threads=0))
    found, shape = layout(batch, 0), plan.row_shape
    failed = {bad.id: f"failed: {bad.reason}" for bad in info.failed}
    rows = []
    for segment, (source, record) in enumerate(examples, 1):
        name, images = info.record_ids[0][segment - 1], [image for image in found.images if image.segment == segment]
        image_tokens, patches = (sum(np.ptp(getattr(i, field)) for i in images) for field in ("tokens", "patches"))
        counts = (np.ptp(found.segments[segment - 1]) - image_tokens, image_tokens, patches)
        names = (f"{segment}", name, datasets[source].directory.name, _kind(datasets[source], record))
        rows.append((*names, failed.get(shorten(name), ""), *(f"{count:,}" for count in counts)))
    note, num_tokens = f"{len(rows)} example{'' if len(rows) == 1 else 's'}", sum(map(np.ptp, found.segments))
    totals = ((num_tokens, shape.length, "tokens"), (found.num_patches, shape.total_patches, "patches"))
    for count, size, unit in totals:
        note += f" · {count:,} of {size:,} {unit} ({1 - count / max(size, 1):.1%} padding)"
    header = ("example", "record", "dataset", "mode / task", "", "text tokens", "image tokens", "patches")
    table = Table(header, rows, names=5, colours=[_colour(i + 1) for i in range(len(rows))])
    strips = plot(lambda canvas: draw(canvas, found, shape), CAPTION, 1.1 + 0.55 * shape.vision_rows)
    return Section(f"row {row:,}", note, [strips], table)


def _kind(dataset: Dataset, i: int) -> str:
    return f"{MODES[dataset.index.modes[i]]} / {dataset.index.task_names[dataset.index.tasks[i]]}"


def _colour(segment: int) -> str:
    return COLOURS[(segment - 1) % len(COLOURS)]


def draw(canvas: Canvas, found: RowLayout, shape: RowShape) -> None:
    """Draw the strips of a row: its tokens with the loss below them, and each of its vision rows."""
    ratios = [1.4] + [1.0] * shape.vision_rows
    tokens, *vision_rows = canvas.subplots(len(ratios), height_ratios=ratios)
    strips = [(axes, shape.num_patches, f"patches {r}") for r, axes in enumerate(vision_rows, 1)]
    for axes, size, label in [(tokens, shape.length, "tokens\n\nloss"), *strips]:
        axes.set(xlim=(0, max(size, 1)), ylim=(0, 1), yticks=[], xticks=[0, size])
        axes.spines[["top", "right"]].set_visible(True)
        axes.set_ylabel(label, rotation=0, ha="right", va="center")

    def bar(axes: Axes, span: tuple[int, int], segment: int, label: str, bottom: float, hatch: str | None) -> None:
        start, stop = span
        axes.bar(start, 1 - bottom, stop - start, bottom, align="edge", color=_colour(segment), hatch=hatch,
                 edgecolor="white", linewidth=0.5)  # fmt: skip
        if (stop - start) * 40 > axes.get_xlim()[1]:
            axes.text((start + stop) / 2, (1 + bottom) / 2, label, ha="center", va="center", color="black",
                      bbox={"boxstyle": "round,pad=0.2", "facecolor": "white", "linewidth": 0})  # fmt: skip

    for segment, span in enumerate(found.segments, 1):
        alone = all(image.segment != segment for image in found.images)
        bar(tokens, span, segment, f"{segment}" if alone else "", 0.3, None)
    for image in found.images:
        label = f"{image.segment}.{image.number}"
        bar(tokens, image.tokens, image.segment, label, 0.3, "////")
        bar(vision_rows[image.vision_row], image.patches, image.segment, label, 0.0, "////")
    for start, stop in _runs(found.loss):
        if found.loss[start]:
            tokens.bar(start, 0.2, stop - start, 0.05, align="edge", color=LOSS)
