"""Tests of the page of records: text and images as the model receives them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor

from phivision_jax.data.view.show import LEGEND, pixels, record_section, spans
from phivision_jax.images.layout import PatchedImage
from phivision_jax.inference.grounding import COLOURS
from phivision_jax.io.html import Span, page
from phivision_jax.rows import expand
from phivision_jax.text.tokenizer import Tokenizer
from tests.support.datasets import write_dataset
from tests.support.records import make_record, png


def test_spans_colour_what_the_loss_sees(processor) -> None:
    record = make_record(2, ((24, 16), (64, 64)))
    example = processor.encode(record.messages, record.images, mode="nothink")
    assert spans(example, processor.tokenizer) == [
        Span("<|im_start|>", "faint"),
        Span("user", "plain"),
        Span("<|im_sep|>", "faint"),
        Span(" image 1 ▢×6 ", "accent"),
        Span(" image 2 ▢×64 ", "accent"),
        Span("is there a red red shape?", "plain"),
        Span("<|im_end|>", "faint"),
        Span("\n<|im_start|>", "faint"),
        Span("assistant", "plain"),
        Span("<|im_sep|>", "faint"),
        Span("<|dummy_84|>", "good"),
        Span("yes", "good"),
        Span("<|im_end|>", "good"),
    ]


def test_spans_show_line_breaks() -> None:
    tokenizer = Tokenizer.small()
    assert spans(expand(tokenizer.encode("a\nb"), []), tokenizer) == [Span("a↵\nb")]


def test_spans_shorten_long_text() -> None:
    tokenizer = Tokenizer.small()
    ids, answer = tokenizer.encode("red " * 40), tokenizer.encode("yes")
    example = expand([*ids, *answer], [], [-100] * len(ids) + answer)
    found = spans(example, tokenizer, max_tokens=11)
    assert found == [
        Span(tokenizer.decode(ids[:5])),
        Span(f" … {len(ids) - 11} tokens … ", "warning"),
        Span(tokenizer.decode(ids[-6:])),
        Span("yes", "good"),
    ]
    assert spans(example, tokenizer, max_tokens=len(ids))[0] == Span("red " * 40)


def test_pixels_inverts_patches() -> None:
    image = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    patches = image.reshape(2, 8, 3, 8, 3).swapaxes(1, 2).reshape(6, -1)
    np.testing.assert_array_equal(pixels(PatchedImage(patches, ((2, 3),)).tiles[0], 8), image)


def test_record_section_shows_the_patches(dataset, processor) -> None:
    """Record 4 has images of 24x16 and 32x32 pixels: 3x2 and 4x4 patches of 8x8."""
    section = record_section(dataset, processor, 4)
    assert section.title == "r004" and section.note == (
        "record 4 of set · nothink / general · 19 text tokens + 22 image tokens = 41; 22 patches; the loss sees 3"
    )
    assert [figure.caption for figure in section.figures] == [
        "image 1: 24×16 pixels\n3 × 2 = 6 patches",
        "image 2: 32×32 pixels\n4 × 4 = 16 patches",
    ]
    with Image.open(io.BytesIO(section.figures[0].png)) as shown:
        assert shown.size == (520, 347)
        colours = np.asarray(shown).astype(int)
    with Image.open(io.BytesIO(dataset[4].images[0])) as image:
        original = np.asarray(image.convert("RGB")).astype(int)
    for y, x in np.ndindex(16, 24):  # each pixel at its middle; lines are at multiples of 8
        np.testing.assert_array_equal(colours[int((y + 0.5) * 347 / 16), int((x + 0.5) * 520 / 24)], original[y, x])
    np.testing.assert_array_equal(colours[100, round(520 / 3)], (original[4, 8] + [0, 114, 178]) // 2)


def test_record_section_names_the_failure(processor, tmp_path: Path) -> None:
    broken = make_record(1, images=(png(24, 16)[:-30],))
    dataset = write_dataset(tmp_path / "set", [make_record(0), broken], processor)
    section = record_section(dataset, processor, 1)
    assert "placeholder" in section.note and not section.figures
    assert "image-broken" in section.text[0].text and "truncated" in section.text[0].text
    with pytest.raises(IndexError):
        record_section(dataset, processor, 2)


def test_page_of_records(dataset, processor) -> None:
    html = page("Records", [LEGEND, record_section(dataset, processor, 4)])
    assert html.count("data:image/png;base64,") == 2
    assert '<span class="good">yes</span>' in html and "&lt;|im_end|&gt;" in html and "<|" not in html


def test_boxes_and_points_in_the_text_are_drawn(tmp_path, processor) -> None:
    """On a white image of 64x64 pixels, shown 460 pixels high."""
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "white").save(file, "PNG")
    texts = "at [0.250, 0.500, 0.750, 1.000], its handle [0.100,0.100]; [1, 2, 3], [3, 4], [0.9, 0.1, 0.2, 0.3]"
    messages = ({"role": "user", "content": "<image>where?"}, {"role": "assistant", "content": texts})
    dataset = write_dataset(tmp_path / "set", [make_record(0, images=(file.getvalue(),), messages=messages)], processor)
    (figure,) = record_section(dataset, processor, 0).figures
    assert figure.caption.endswith("outlined: boxes and points in the text")
    pixels = np.asarray(Image.open(io.BytesIO(figure.png)).convert("RGB"))
    # Labels are above the marks: the last row and the sides of the box, and the sides of the point, show the places.
    for colour, sides in ((COLOURS[0], (115, 344, 459)), (COLOURS[1], (40, 52, 52))):
        found = (pixels == ImageColor.getrgb(colour)).all(-1)
        rows, columns = (np.flatnonzero(found.any(axis)) for axis in (1, 0))
        if colour == COLOURS[1]:
            columns = np.flatnonzero(found[46])
        assert np.abs(np.subtract((columns.min(), columns.max(), rows.max()), sides)).max() <= 4
    assert not any((pixels == ImageColor.getrgb(colour)).all(-1).any() for colour in COLOURS[2:])


def test_legend_names_the_token_of_answers_without_thoughts() -> None:
    assert any("<|dummy_84|> begins an answer without thoughts" in span.text for span in LEGEND.text)
