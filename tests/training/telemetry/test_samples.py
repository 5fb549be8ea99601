"""Answers drawn with their pictures."""

import io
from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageColor

from phivision_jax.evaluation.runner import Answer
from phivision_jax.training.telemetry.samples import (
    MARGIN,
    PICTURE_HEIGHT,
    RIGHT,
    WIDTH,
    WRONG,
    pictures,
    sample_picture,
)


def colours(picture):
    return {tuple(colour) for colour in np.asarray(picture).reshape(-1, 3)}


def test_the_picture_is_shown_whole_and_sharp():
    image = Image.new("RGB", (64, 64), "#ff0000")
    image.putpixel((0, 0), (0, 0, 255))
    drawn = sample_picture([image], "<image>\nwhat shape?", "circle", "circle", correct=True)
    pixels = np.asarray(drawn)
    red, blue = ((pixels == colour).all(-1).sum() for colour in ([255, 0, 0], [0, 0, 255]))
    scale = PICTURE_HEIGHT // 64  # 5
    assert (red, blue) == ((64 * 64 - 1) * scale**2, scale**2)
    assert drawn.width == WIDTH


def test_right_and_wrong_answers_look_different():
    right, wrong = (sample_picture([], "1 + 1?", "2", "2", correct=correct) for correct in (True, False))
    assert ImageColor.getrgb(RIGHT) in colours(right) and ImageColor.getrgb(WRONG) not in colours(right)
    assert ImageColor.getrgb(WRONG) in colours(wrong) and right.size == wrong.size


def test_any_sizes_and_lengths_fit():
    strip, tall = Image.new("L", (4000, 1), 0), Image.new("RGBA", (3, 2000))
    drawn = sample_picture([strip, tall], "why? " * 400, "", "x" * 5000, correct=False)
    assert drawn.width == WIDTH and drawn.height > PICTURE_HEIGHT
    assert drawn.height < 4000  # long texts are shortened in their middle
    assert drawn.getpixel((0, 0)) == drawn.getpixel((WIDTH - 1, drawn.height - MARGIN // 2)) == (255, 255, 255)


def test_answers_stand_with_their_own_pictures():
    def png(colour):
        file = io.BytesIO()
        Image.new("RGB", (8, 8), (0, 0, colour)).save(file, "PNG")
        return file.getvalue()

    records = [SimpleNamespace(images=(png(100 + i),)) for i in range(3)]
    records[1].images += (b"broken",)
    answers = [Answer(str(i), "general", "nothink", "which?", "a", "b", False) for i in range(5)]
    drawn = pictures(records, answers)
    shown = [max(blue for red, green, blue in colours(picture) if red == green == 0) for picture in drawn]
    assert shown == [100, 101, 102]
    assert len({picture.size for picture in drawn}) == 1  # the broken one is left out
    assert pictures([], answers) == []
