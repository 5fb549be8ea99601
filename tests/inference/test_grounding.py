"""Boxes and points: found in texts that were made from known ones; their places on images."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image, ImageColor

from phivision_jax.inference.grounding import COLOURS, Mark, draw, find, fit

SHARE = st.floats(0, 1)
FILLER = st.text("abc déf\n:,.-<>*0123456789", max_size=12)
SPACE = st.sampled_from(["", " ", "\n", "  "])


@st.composite
def marked_texts(draw_value):
    """(text, [(shares, span)]) of boxes and points with any number of decimals, in wrappers, between other text."""
    text, marks = draw_value(FILLER), []
    for _ in range(draw_value(st.integers(0, 4))):
        shares = draw_value(st.lists(SHARE, min_size=4, max_size=4) | st.lists(SHARE, min_size=2, max_size=2))
        if len(shares) == 4:
            x1, x2, y1, y2 = *sorted(shares[:2]), *sorted(shares[2:])
            shares = [x1, y1, x2, y2]
        decimals = draw_value(st.integers(1, 9))
        numbers = [f"{share:.{decimals}f}" for share in shares]
        gaps = [draw_value(SPACE) + n + draw_value(SPACE) for n in numbers]
        opening, closing = draw_value(st.sampled_from([("", ""), ("<box>", "</box>"), ("<|box|>", ""), ("[", "]")]))
        text += opening
        start = len(text)
        text += "[" + ",".join(gaps) + "]"
        marks.append(([float(n) for n in numbers], (start, len(text))))
        text += closing + draw_value(FILLER)
    return text, marks


@given(marked_texts(), st.integers(1, 12_000), st.integers(1, 12_000))
def test_find_inverts_writing(written, width, height):
    text, want = written
    got = find(text, (width, height))
    assert [mark.span for mark in got] == [span for _, span in want]
    for mark, (shares, _) in zip(got, want, strict=True):
        assert len(mark.xy) == len(shares)
        np.testing.assert_allclose(np.reshape(mark.xy, (-1, 2)), np.reshape(shares, (-1, 2)) * (width, height))


@given(marked_texts(), st.data())
def test_marks_of_a_beginning_are_the_first_marks(written, data):
    text, _ = written
    end = data.draw(st.integers(0, len(text)))
    assert find(text[:end], (64, 48)) == [mark for mark in find(text, (64, 48)) if mark.span[1] <= end]


@given(st.text("[]0.19,e-+ \n<nai_f>x", max_size=60))
@example("[nan, 0.5]")
@example("[0.1, 0.2, inf, 0.9]")
@example("[1e999, 0.5]")
def test_any_text_gives_marks_inside_the_image(text):
    for mark in find(text, (30, 20)):
        assert all(0 <= x <= side for x, side in zip(mark.xy, (30, 20, 30, 20), strict=False))


@pytest.mark.parametrize(
    "text",
    ["[0.1, 0.2, 0.3]", "[0.1]", "[]", "[0.1, 0.2, 0.3, 0.4, 0.5]", "[0.1, 0.2, 0.3, 1.3]", "[-0.4, 0.2]", "[0, 1]",
     "[64, 30, 128, 90]", "[0.9, 0.1, 0.2, 0.3]", "[0.1, 0.9, 0.2, 0.3]", "[a, b]", "[0.1; 0.2]", "(0.1, 0.2)",
     "[0.1, 0.2", "[0.1, 0.2, 0.3, 0.4"],
)  # fmt: skip
def test_other_lists_are_text(text):
    assert find(text, (100, 100)) == []


def test_numbers_slightly_outside_are_clipped():
    assert find("[-0.01, 0.5, 1.013, 1]", (200, 100)) == [Mark((0.0, 50.0, 200.0, 100.0), "", (0, 22))]


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("[0.1, 0.2, 0.3, 0.4]", [""]),
        ("The red cup: [0.1, 0.2, 0.3, 0.4]", ["The red cup"]),
        ("Here they are:\n- **cup**: <box>[0.1, 0.2, 0.3, 0.4]</box>\n2. <ref>dog</ref> [0.5, 0.5]", ["cup", "dog"]),
        ("a cat [0.1, 0.2, 0.3, 0.4], an and-gate [0.1, 0.2] and birds [0.3, 0.3]", ["a cat", "an and-gate", "birds"]),
        ('{"bbox_2d": [0.1, 0.2, 0.3, 0.4]}', [""]),
        ("The object that you have asked me for is at [0.1, 0.2]", [""]),
        ("杯子：[0.1, 0.2, 0.3, 0.4]", ["杯子"]),
    ],
)
def test_labels(text, labels):
    assert [mark.label for mark in find(text, (10, 10))] == labels


def extent(image, colour):
    """First and last column and row of a colour; None without any."""
    found = (np.asarray(image) == ImageColor.getrgb(colour)).all(-1)
    rows, columns = (np.flatnonzero(found.any(axis)) for axis in (1, 0))
    return (columns[0], rows[0], columns[-1], rows[-1]) if len(rows) else None


def test_boxes_land_on_the_image():
    image = Image.new("RGB", (640, 480), "#808080")
    shown = draw(image, find("[0.25, 0.5, 0.75, 1.0]\n[0.1, 0.1]", image.size))
    x1, y1, x2, y2 = extent(shown, COLOURS[0])
    assert abs(x1 - 160) <= 1 and abs(x2 - 480) <= 1 and abs(y2 - 479) <= 1
    assert y1 < 240  # the number of the box is above it
    pixels = np.asarray(shown)
    assert (pixels[248:470, 170:470] == 0x80).all() and (pixels[:, 500:] == 0x80).all()
    left, top, right, bottom = extent(draw(image, find("[0.1, 0.1]", image.size)), COLOURS[0])
    assert abs((left + right) / 2 - 64) <= 1 and abs((top + bottom) / 2 - 48) <= 1 and 10 < right - left < 30
    assert extent(image, COLOURS[0]) is None  # a new image


@pytest.mark.parametrize("size", [(1, 1), (40, 30), (640, 480), (4000, 300), (3, 5000)])
def test_lines_grow_with_the_image(size):
    image = Image.new("RGBA", size, "#404040")
    marks = find("everything [0.0, 0.0, 1.0, 1.0]\nthe end [1.0, 1.0]", size)
    shown = draw(image, marks)
    assert shown.size == size and shown.mode == "RGB"
    outlined = draw(image, marks[:1])
    assert extent(outlined, COLOURS[0]) == (0, 0, size[0] - 1, size[1] - 1)
    middle = np.asarray(outlined)[size[1] // 2, : size[0] // 2 + 1]
    line = int((middle == ImageColor.getrgb(COLOURS[0])).all(-1).sum())
    assert line == {1: 1, 40: 1, 640: 3, 4000: 6, 3: 1}[size[0]]


def test_neighbouring_marks_differ_in_colour():
    image = Image.new("RGB", (400, 300))
    text = "\n".join(f"[{i / 20:.2f}, 0.1, {i / 20 + 0.04:.2f}, 0.9]" for i in range(10))
    shown = draw(image, find(text, image.size))
    assert all(extent(shown, colour) for colour in COLOURS)


def test_fit_enlarges_by_an_integer_and_draws_on_the_result():
    image = Image.new("RGB", (50, 20), "white")
    shown = fit(image, "[0.2, 0.25, 0.4, 0.75]", 320, 320)
    assert shown.size == (300, 120)
    assert np.abs(np.subtract(extent(shown, COLOURS[0]), (60, 30, 120, 90))).max() <= 1
    assert fit(Image.new("L", (4000, 1)), "", 320, 320).size == (320, 1)
