"""A question's images with the question, the answer and the reference below them, as one image to look at."""

import contextlib
from collections.abc import Iterable, Sequence

from PIL import Image
from rich.console import Console
from rich.text import Text

from phivision_jax.evaluation.benchmark import Item
from phivision_jax.evaluation.results import Result
from phivision_jax.images.decode import open_image, to_rgb
from phivision_jax.inference.grounding import fit
from phivision_jax.io.html import text_image

WIDTH, MARGIN, IMAGE_HEIGHT = 480, 16, 360
"""Pixels. Images are scaled to fit, small ones by an integer so that their pixels stay sharp."""
LINE_HEIGHT, LINE_LENGTH = 20, 49
"""Pixels, and characters: the font is monospaced, so that lines break at the right margin."""
INK, SOFT, CORRECT, INCORRECT = "#1b1f24", "#7a818a", "#1a7f37", "#b35900"
MAX_CHARACTERS = 1200
"""Longer texts lose their middle: an answer that thinks can be long."""


def answer_image(
    images: Sequence[Image.Image], question: str, answer: str, reference: str | None = None, correct: bool | None = None
) -> Image.Image:
    """Images below each other, the question, the answer and the reference, as an RGB image ``WIDTH`` pixels wide.

    Boxes and points of the answer are shown on the last image.

    Args:
      images: any number of any size.
      question: the text; ``<image>`` markers are left out.
      answer: of the model.
      reference: the expected answer; None leaves it out.
      correct: sets the colour of the answer; None for an answer that was not scored.
    """
    colour = INK if correct is None else CORRECT if correct else INCORRECT
    texts = [_text(question.replace("<image>", ""), SOFT), _text(answer.strip() or "(no answer)", colour)]
    answers = [""] * len(images[1:]) + [answer.rsplit("</think>", 1)[-1]]
    pairs = zip(images, answers, strict=False)
    blocks = [*(fit(image, found, WIDTH - 2 * MARGIN, IMAGE_HEIGHT) for image, found in pairs), *texts]
    if reference is not None:
        blocks.append(_text(f"expected: {reference.strip()}", SOFT))
    canvas = Image.new("RGB", (WIDTH, MARGIN + sum(block.height + MARGIN for block in blocks)), "white")
    top = MARGIN
    for block in blocks:
        canvas.paste(block, ((WIDTH - block.width) // 2, top))
        top += block.height + MARGIN
    return canvas


def answer_images(examples: Iterable[tuple[Item, Result]]) -> list[Image.Image]:
    """``answer_image`` of items and the results of them; images that cannot be decoded are left out."""
    shown = []
    for item, result in examples:
        images = []
        for image in item.images:
            with contextlib.suppress(ValueError, OSError):
                images.append(to_rgb(open_image(image)))
        answer = f"<think>{result.thought}</think>{result.answer}" if result.thought else result.answer
        reference = str(item.record.get("answer", ""))
        shown.append(answer_image(images, item.question, answer, reference, result.value == 1))
    return shown


def _text(text: str, colour: str) -> Image.Image:
    if len(text) > MAX_CHARACTERS:
        text = f"{text[: MAX_CHARACTERS // 2]} … {text[-MAX_CHARACTERS // 2 :]}"
    lines = Text(text.strip()).wrap(Console(), LINE_LENGTH)  # by the widths of characters in a terminal
    return text_image([line.plain for line in lines], colour, WIDTH - 2 * MARGIN, LINE_HEIGHT)
