"""Tests of the page of packed rows: the layout by hand, and the figure read back from its pixels."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure as Canvas
from PIL import Image, ImageColor

from phivision_jax.batch import RowShape
from phivision_jax.data.feed.pipeline import batches
from phivision_jax.data.plan.mixture import Mixture
from phivision_jax.data.plan.plan import make_plan
from phivision_jax.data.view.show import COLOURS, LOSS, ImageSpan, draw, layout, row_section
from phivision_jax.images.layout import PatchedImage
from phivision_jax.io.html import page
from phivision_jax.rows import expand, fill_rows
from tests.support.datasets import write_dataset
from tests.support.records import CONFIG, make_record, png

SHAPE = RowShape(160, 2, 80)


@pytest.fixture(scope="module")
def plan(dataset, processor):
    return make_plan([dataset], Mixture.from_directories("set"), processor, SHAPE)


def row_of(examples, *shape):
    return fill_rows([examples], RowShape(*shape), CONFIG)


def image_of(rows: int, columns: int) -> PatchedImage:
    return PatchedImage(np.zeros((rows * columns, CONFIG.vision.patch_dim), np.uint8), ((rows, columns),))


def test_layout_by_hand() -> None:
    """Three examples in T = 20: 1 has two images side by side (6 and 4 patches), 2 is text, 3 has one of 3 patches.

    R = 2, P = 8: the 6 go to vision row 0, the 4 find no room there (row 1), the 3 go where they fit best (row 1).
    """
    first = expand([5, -200, -200, 6, 7], [image_of(2, 3), image_of(2, 2)], [-100, -100, -100, -100, 7])
    second = expand([5, 6], [], [-100, 6])
    third = expand([-200, 9], [image_of(1, 3)], [-100, 9])
    found = layout(row_of([first, second, third], 20, 2, 8), 0)
    assert found.segments == ((0, 13), (13, 15), (15, 19))
    assert found.images == (
        ImageSpan(segment=1, number=1, tokens=(1, 7), vision_row=0, patches=(0, 6)),
        ImageSpan(segment=1, number=2, tokens=(7, 11), vision_row=1, patches=(0, 4)),
        ImageSpan(segment=3, number=1, tokens=(15, 18), vision_row=1, patches=(4, 7)),
    )
    # A position has a weight where its target, the next token, is a label.
    assert np.flatnonzero(found.loss).tolist() == [11, 13, 17]
    assert found.num_patches == 13


def test_layout_separates_adjacent_images_of_two_examples() -> None:
    one = expand([-200], [image_of(1, 2)])
    found = layout(row_of([one, one], 4, 1, 4), 0)
    assert [(i.segment, i.number, i.tokens, i.patches) for i in found.images] == [
        (1, 1, (0, 2), (0, 2)),
        (2, 1, (2, 4), (2, 4)),
    ]


def test_layout_of_merged_tokens() -> None:
    """Two tokens of two patches each; two tiles of two patches with a token each; a placeholder's blank token."""
    tables = [np.array([[[0, 1]], [[2, 3]]]), np.array([[[0, 1]], [[3, -1]]]), np.array([[[-1, -1]]])]
    grids = [((2, 2),), ((1, 2), (2, 1)), ((1, 1),)]
    images = [
        PatchedImage(np.zeros((sum(h * w for h, w in g), CONFIG.vision.patch_dim), np.uint8), g, t, np.ones(t.shape))
        for g, t in zip(grids, tables, strict=True)
    ]
    row = row_of([expand([-200, 5, -200], images[:2]), expand([-200], images[2:])], 8, 2, 6, (8, 1, 2))
    assert [(i.segment, i.number, i.tokens, i.vision_row, i.patches) for i in layout(row, 0).images] == [
        (1, 1, (0, 2), 0, (0, 4)),
        (1, 2, (3, 4), 1, (0, 2)),
        (1, 3, (4, 5), 1, (3, 4)),
        (2, 1, (5, 6), 0, (0, 0)),
    ]
    assert layout(row_of([expand([1, 2], [])], 4, 1, 0, (0, 1, 2)), 0).images == ()


def test_layout_without_examples_or_images() -> None:
    empty = layout(row_of([], 4), 0)
    assert (empty.segments, empty.images) == ((), ())
    assert layout(row_of([expand([1, 2], [])], 4), 0).segments == ((0, 2),)


def test_draw_colours_every_position_by_its_example(dataset, plan, processor) -> None:
    """Read the strips back: the middle of each token and patch has its owner's colour, hatched for images."""
    stream = batches([dataset], plan, processor, batch_rows=1, num_threads=0)
    for batch, _ in [next(stream), next(stream)]:
        found = layout(batch, 0)
        assert found.images and len(found.segments) > 1
        canvas, file = Canvas(figsize=(20, 4)), io.BytesIO()
        draw(canvas, found, plan.row_shape)
        canvas.savefig(file, dpi=100)
        tokens, *vision_rows = canvas.axes
        pixels = np.asarray(Image.open(file).convert("RGB"))

        def strip(axes, x, bottom, top, pixels=pixels):
            """The colours around the middle of one position."""
            left, high = axes.transData.transform((x + 0.3, top))
            right, low = axes.transData.transform((x + 0.7, bottom))
            rows = slice(len(pixels) - round(high), len(pixels) - round(low))
            return {tuple(p) for p in pixels[rows, round(left) : round(right)].reshape(-1, 3).tolist()}

        for x, segment in enumerate(batch.segment_ids[0].tolist()):
            colours = strip(tokens, x, 0.85, 0.95)
            if segment:
                assert ImageColor.getrgb(COLOURS[segment - 1]) in colours, x
            assert (len(colours) > 1) == (batch.vision_index[0, x] >= 0), (x, colours)
            assert segment or colours == {(255, 255, 255)}, x
            assert (ImageColor.getrgb(LOSS) in strip(tokens, x, 0.1, 0.2)) == found.loss[x], x
        owner = {(i.vision_row, p): i.segment for i in found.images for p in range(*i.patches)}
        for r, axes in enumerate(vision_rows):
            for p in range(SHAPE.num_patches):
                colours = strip(axes, p, 0.8, 0.95)
                assert ((r, p) in owner) == (batch.patch_segments[0, r, p] > 0)
                expected = ImageColor.getrgb(COLOURS[owner[r, p] - 1]) if (r, p) in owner else (255, 255, 255)
                assert expected in colours and (len(colours) > 1) == ((r, p) in owner), (r, p)


def test_row_section_lists_the_examples(dataset, plan, processor) -> None:
    section = row_section(plan, [dataset], processor, 0)
    records = [dataset[i].id for _, i in plan.rows(0, 1)[0].tolist()]
    assert section.title == "row 0" and section.note.startswith(f"{len(records)} examples · ")
    assert [row[1] for row in section.table.rows] == records
    used = sum(int(n) for row in section.table.rows for n in row[5:7])
    assert f"· {used} of 160 tokens (" in section.note
    assert f"· {sum(int(row[7]) for row in section.table.rows)} of 160 patches (" in section.note
    assert section.table.colours[:2] == list(COLOURS[:2]) and section.figures[0].dark
    assert '<i class="swatch" style="background: #4477aa"></i>1</td>' in page("Rows", [section])


def test_row_section_names_failed_records(processor, tmp_path: Path) -> None:
    broken = make_record(1, ((64, 64),), images=(png(64, 64)[:-30],))
    dataset = write_dataset(tmp_path / "set", [make_record(0), broken], processor)
    plan = make_plan([dataset], Mixture.from_directories("set"), processor, SHAPE)
    rows = {row[1]: row for row in row_section(plan, [dataset], processor, 0).table.rows}
    assert rows["r000"][4] == "" and rows["r001"][4] == "failed: image-broken" and rows["r001"][7] == "64"
    with pytest.raises(IndexError, match="a plan with 1 steps of 1 rows"):
        row_section(plan, [dataset], processor, 1)
