"""Tests of images with the question and the answer below them."""

import dataclasses
import io
from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageColor

from phivision_jax.evaluation.answer_images import (
    CORRECT,
    IMAGE_HEIGHT,
    INCORRECT,
    INK,
    MARGIN,
    WIDTH,
    answer_image,
    answer_images,
)
from phivision_jax.evaluation.benchmark import Item


def colours(image):
    return {tuple(colour) for colour in np.asarray(image).reshape(-1, 3)}


def test_answer_image_scales_pixels_by_an_integer():
    image = Image.new("RGB", (64, 64), "#ff0000")
    image.putpixel((0, 0), (0, 0, 255))
    shown = answer_image([image], "<image>\nwhat shape?", "circle", "circle", correct=True)
    pixels = np.asarray(shown)
    red, blue = ((pixels == colour).all(-1).sum() for colour in ([255, 0, 0], [0, 0, 255]))
    scale = IMAGE_HEIGHT // 64  # 5
    assert (red, blue) == ((64 * 64 - 1) * scale**2, scale**2)
    assert shown.width == WIDTH


def test_answer_image_colours_the_answer():
    right, wrong, unscored = (answer_image([], "1 + 1?", "2", "2", correct) for correct in (True, False, None))
    for image, has_correct, has_incorrect in ((right, True, False), (wrong, False, True), (unscored, False, False)):
        assert (ImageColor.getrgb(CORRECT) in colours(image)) == has_correct
        assert (ImageColor.getrgb(INCORRECT) in colours(image)) == has_incorrect
    assert right.size == wrong.size


def test_answer_image_fits_any_size_and_length():
    strip, tall = Image.new("L", (4000, 1), 0), Image.new("RGBA", (3, 2000))
    shown = answer_image([strip, tall], "why? " * 400, "", "x" * 5000, correct=False)
    assert shown.width == WIDTH and shown.height > IMAGE_HEIGHT
    assert shown.height < 4000  # long texts lose their middle
    pixels = np.asarray(shown)
    assert (pixels[:, :MARGIN] == 255).all() and (pixels[:, -MARGIN:] == 255).all()
    assert (pixels[:MARGIN] == 255).all() and (pixels[-MARGIN:] == 255).all()


def test_answer_image_replaces_an_empty_answer():
    assert ImageColor.getrgb(INK) in colours(answer_image([], "How much?", "  "))
    assert answer_image([], "", "").size == answer_image([], "", "It costs $5 and $6_x$.").size


def test_answer_images_pairs_items_with_their_results():
    def png(blue):
        file = io.BytesIO()
        Image.new("RGB", (8, 8), (0, 0, blue)).save(file, "PNG")
        return file.getvalue()

    items = [Item(str(i), "which?", (png(100 + i),), {"answer": "b"}) for i in range(3)]
    items[1] = dataclasses.replace(items[1], images=(*items[1].images, b"broken"))
    shown = answer_images([(item, SimpleNamespace(thought="", answer="a", value=0.0)) for item in items])
    assert [max(b for r, g, b in colours(image) if r == g == 0) for image in shown] == [100, 101, 102]
    assert len({image.size for image in shown}) == 1  # the broken one is left out


def test_answer_image_shows_boxes_of_the_answer_on_the_last_image():
    images = [Image.new("RGB", (100, 100), "white")] * 2
    without = answer_image(images, "where?", "<think>[0.1, 0.1, 0.9, 0.9]</think>nowhere")
    shown = answer_image(images, "where?", "<think>[0.1, 0.1, 0.9, 0.9]</think>[0.5, 0.5, 1.0, 1.0]")
    changed = (np.asarray(without)[: 2 * (MARGIN + 300)] != np.asarray(shown)[: 2 * (MARGIN + 300)]).any(-1)
    rows, columns = (np.flatnonzero(changed.any(axis)) for axis in (1, 0))
    assert abs(rows.min() - (2 * MARGIN + 450)) <= 3 and abs(columns.min() - WIDTH / 2) <= 3
