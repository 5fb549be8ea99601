"""Benchmarks of elements in screenshots: an instruction and the box of the element, in pixels.

The model is asked in its own format, for a box in relative coordinates; the centre of the box counts as the click. A
reply with a point counts as the point.
"""

import abc
import dataclasses
from collections.abc import Sequence

from phivision_jax.evaluation import scoring
from phivision_jax.evaluation.benchmark import Item, Scored
from phivision_jax.evaluation.benchmarks.prompts import RELATIVE_BOX, plain
from phivision_jax.evaluation.scoring import Score
from phivision_jax.evaluation.tables.benchmark import TableBenchmark, means
from phivision_jax.evaluation.tables.row import Row
from phivision_jax.images.decode import image_size


class Grounding(TableBenchmark):
    """Find the element of an instruction."""

    images = ("img_filename", "image")

    @abc.abstractmethod
    def corners(self, row: Row) -> list[float]:
        """Left, top, right and bottom in pixels."""

    @abc.abstractmethod
    def groups(self, row: Row) -> dict[str, str]:
        """Groups that are reported apart."""

    def item(self, row: Row) -> Item:
        left, top, right, bottom = self.corners(row)
        if not (left <= right and top <= bottom):
            raise row.error("bbox", f"is {row.value('bbox')}, not a box with its corners in order")
        instruction = plain(row.text("instruction", "question"))
        question = f"Locate the element in the screenshot for this instruction: {instruction}\n{RELATIVE_BOX}"
        return Item(row.id, question, (), {}, self.groups(row), str(row.optional("img_filename") or ""))

    def complete(self, item: Item, row: Row, images: tuple[bytes, ...]) -> Item:
        if len(images) != 1:
            raise ValueError(f"the row has {len(images)} images, not one")
        width, height = image_size(images[0])
        left, top, right, bottom = self.corners(row)
        if max(left, 0) > min(right, width) or max(top, 0) > min(bottom, height):
            raise ValueError(f"column 'bbox' is {row.value('bbox')}, outside of the image of {width}x{height} pixels")
        box = [max(left, 0) / width, max(top, 0) / height, min(right / width, 1), min(bottom / height, 1)]
        return dataclasses.replace(item, images=images, record={"bbox_xyxy_norm": box, "image_size": [width, height]})

    def score(self, prediction: str, item: Item) -> Score:
        score = scoring.screenspot_bbox(prediction, item.record)
        return score if score.extracted is not None else scoring.screenspot_point(prediction, item.record)

    def summary(self, scored: Sequence[Scored]) -> dict[str, float]:
        names = dict.fromkeys(name for each in scored for name in each.item.groups)
        figures = super().summary(scored)
        for name in names:
            figures |= means(scored, name)
        return figures | {"unparsed": float(sum(each.score.extracted is None for each in scored))}
