"""A picture to look at: what was shown, what was asked, what the model answered and what was expected."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from PIL import Image, ImageDraw

from phivision_jax.data.records import Record
from phivision_jax.data.view.drawing import INK, PAPER, SOFT, Run, draw_runs
from phivision_jax.evaluation.runner import Answer
from phivision_jax.images.decode import open_image, to_rgb

WIDTH, MARGIN, PICTURE_HEIGHT = 480, 16, 360
"""Pixels; pictures are scaled to fit, small ones by whole numbers so that their pixels stay sharp."""
RIGHT, WRONG = "#1a7f37", "#b35900"
MOST_CHARACTERS = 1200
"""Of each text; a thinking answer can be long."""


def sample_picture(
    images: Sequence[Image.Image], question: str, answer: str, expected: str, *, correct: bool
) -> Image.Image:
    """One question with its pictures above it, the answer and what was expected below, as an RGB picture.

    Args:
      images: none, for a question about no picture, or several: they stand below each other.
    """
    shown = [_fitted(image) for image in images]
    question = question.replace("<image>", "").strip()
    blocks = [
        [Run(_shortened(question), INK, bold=True)],
        [Run("answer  ", SOFT), Run(_shortened(answer) or "(nothing)", RIGHT if correct else WRONG)],
        [Run("expected  ", SOFT), Run(_shortened(expected), INK)],
    ]
    width = WIDTH - 2 * MARGIN
    heights = [draw_runs(None, (0, 0), width, block) for block in blocks]
    height = sum(image.height + MARGIN for image in shown) + sum(heights) + (len(blocks) + 1) * MARGIN
    canvas = Image.new("RGB", (WIDTH, height), PAPER)
    draw, top = ImageDraw.Draw(canvas), MARGIN
    for image in shown:
        canvas.paste(image, ((WIDTH - image.width) // 2, top))
        top += image.height + MARGIN
    for block, block_height in zip(blocks, heights, strict=True):
        draw_runs(draw, (MARGIN, top), width, block)
        top += block_height + MARGIN
    return canvas


def _fitted(image: Image.Image) -> Image.Image:
    scale = min((WIDTH - 2 * MARGIN) / image.width, PICTURE_HEIGHT / image.height)
    whole = scale >= 2
    scale = float(int(scale)) if whole else scale
    size = max(round(image.width * scale), 1), max(round(image.height * scale), 1)
    return image.convert("RGB").resize(size, Image.Resampling.NEAREST if whole else Image.Resampling.LANCZOS)


def _shortened(text: str) -> str:
    text = text.strip()
    return text if len(text) <= MOST_CHARACTERS else f"{text[: MOST_CHARACTERS // 2]} … {text[-MOST_CHARACTERS // 2 :]}"


def pictures(records: Sequence[Record], answers: Sequence[Answer]) -> list[Image.Image]:
    """``sample_picture`` of records and the answers to them; pictures that cannot be read are left out."""
    made = []
    for record, answer in zip(records, answers, strict=False):
        shown = []
        for image in record.images:
            with contextlib.suppress(ValueError, OSError):
                shown.append(to_rgb(open_image(image)))
        made.append(sample_picture(shown, answer.question, answer.prediction, answer.reference, correct=answer.correct))
    return made
