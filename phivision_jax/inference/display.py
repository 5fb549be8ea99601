"""Answers as text that notebooks display with images, boxes and the folded thought."""

import base64
import contextlib
import io
from collections.abc import Iterable
from typing import Self

from phivision_jax.images.sources import ImageSource, pixels
from phivision_jax.inference.grounding import fit
from phivision_jax.inference.requests import Reply
from phivision_jax.io.html import render

WIDTH, HEIGHT = 640, 480
"""Pixels in which a displayed image fits; half as many if there are several."""


class Answer(str):
    """The text of a reply, thoughts in their tags: a ``str`` that Jupyter displays as a page.

    The page shows the images with the answer's boxes and points on the last one, the thought folded, the answer, and
    its counts and times.

    Args:
      reply: of which the text is taken.
      images: of the request; those that cannot be opened any more are left out of the page.
    """

    reply: Reply
    images: tuple[ImageSource, ...]

    def __new__(cls, reply: Reply, images: Iterable[ImageSource] = ()) -> Self:
        self = super().__new__(cls, reply.text)
        self.reply, self.images = reply, tuple(images)
        return self

    def __getnewargs__(self) -> tuple[Reply, tuple[ImageSource, ...]]:  # type: ignore[override]  # for copies
        return self.reply, self.images

    def _repr_html_(self) -> str:
        parts, shown = min(len(self.images), 2), []
        for i, image in enumerate(self.images, 1):
            marked = self.reply.answer if i == len(self.images) else ""
            with contextlib.suppress(ValueError, OSError):
                file = io.BytesIO()
                fit(pixels(image), marked, WIDTH // parts, HEIGHT // parts).save(
                    file, "JPEG", quality=90, subsampling=0
                )
                shown.append("data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode())
        return render("answer.html.jinja", images=shown, reply=self.reply)
