"""Boxes and points of an answer and of its reference, relative to the last image of the item."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from phivision_jax.evaluation.results import Result
from phivision_jax.inference.grounding import find


@dataclasses.dataclass(frozen=True)
class RelativeMark:
    """A box or a point on an image."""

    kind: Literal["reference", "answer", "scored"]
    """The reference, a mark in the answer's text, or the box or point that the rule understood."""
    xy: tuple[float, ...]
    """left, top, right, bottom of a box, or x, y of a point, from 0 to 1."""
    label: str = ""


def marks_of(result: Result) -> list[RelativeMark]:
    """The reference box of a row, the boxes and points of its answer, and what its rule understood if that differs.

    Coordinates are read as the record's keys define them (``bbox_xyxy_norm``; ``bbox_xywh_px`` with ``image_size``),
    and never guessed from their magnitude: a rule with a reference in pixels understands answers in pixels.
    """
    record, found = result.record, []
    box, size = _numbers(record.get("bbox_xyxy_norm"), 4), None
    pixels, image_size = _numbers(record.get("bbox_xywh_px"), 4), _numbers(record.get("image_size"), 2)
    if box is None and pixels is not None and image_size is not None:
        left, top, width, height = pixels
        size, box = image_size, _relative((left, top, left + width, top + height), image_size)
    if box is not None:
        found.append(RelativeMark("reference", box))
    found += [RelativeMark("answer", mark.xy, mark.label) for mark in find(result.answer, (1, 1))]
    understood = _numbers(result.extracted, 4) or _numbers(result.extracted, 2)
    if found and understood is not None:
        xy = understood if size is None else _relative(understood, size)
        if all(0 <= value <= 1 for value in xy) and not any(_equal(mark.xy, xy) for mark in found):
            found.append(RelativeMark("scored", xy))
    return found


def _numbers(value: Any, count: int) -> tuple[float, ...] | None:
    if not isinstance(value, list | tuple) or len(value) != count:
        return None
    usable = all(isinstance(number, int | float) and abs(number) < 1e9 for number in value)
    return tuple(map(float, value)) if usable else None


def _relative(pixels: Sequence[float], size: Sequence[float]) -> tuple[float, ...]:
    return tuple(value / max(size[i % 2], 1) for i, value in enumerate(pixels))


def _equal(a: Sequence[float], b: Sequence[float]) -> bool:
    return len(a) == len(b) and all(abs(x - y) < 1e-4 for x, y in zip(a, b, strict=True))
