"""Points and boxes on screenshots. Coordinates have one convention per rule, never the one that their size suggests."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from phivision_jax.evaluation.scoring.record import numbers_of
from phivision_jax.evaluation.scoring.score import UNPARSED, Score, compared
from phivision_jax.evaluation.scoring.thoughts import answer_of

_NUMBER = r"-?\d++(?:\.\d++)?+%?+"
_BETWEEN = r"(?:\s*+,\s*+|\s++)"
# As the patterns of lmms-eval, which take quadratic time on long runs of spaces or of opening tags.
_NUMBERS = re.compile(_NUMBER)
_PAIR = re.compile(rf"[\[(]\s*+({_NUMBER}){_BETWEEN}({_NUMBER})\s*+[\])]")
_FOUR = rf"({_NUMBER}){_BETWEEN}({_NUMBER}){_BETWEEN}({_NUMBER}){_BETWEEN}({_NUMBER})"
_BARE_BOX = re.compile(rf"[\[(]\s*+{_FOUR}\s*+[\])]")
_X = re.compile(rf"['\"]?[xX]['\"]?\s*+[:=]\s*+({_NUMBER})")
_Y = re.compile(rf"['\"]?[yY]['\"]?\s*+[:=]\s*+({_NUMBER})")
_TAG = re.compile(r"<\s*+bbox", re.IGNORECASE)
_END_TAG = re.compile(r"<\s*+/\s*+bbox\s*+>", re.IGNORECASE)
_REC_NUMBER = r"(-?\d++(?:\.\d++)?+)"
_REC_BOX = re.compile(r"[\[(]\s*+" + r",\s*+".join([_REC_NUMBER] * 4) + r"\s*+[\])]")
_CLICK = re.compile(r"x=([\d.]++), y=([\d.]++)")


def screenspot_point(prediction: str, record: Mapping[str, Any]) -> Score:
    """Test if a point is in a box, borders included, as the tasks "screenspot_v2" and "screenspot_pro" of lmms-eval.

    Forms in order: the centre of ``<bbox>…</bbox>``; a pair in brackets; "x: … y: …"; the centre of four numbers in
    brackets, or of a reply of four numbers and nothing else; the centre of the first four numbers of a reply with the
    word "box" or "rect"; the first two numbers. "%" divides by 100.

    Args:
      prediction: The reply.
      record: ``bbox_xyxy_norm``: the reference, from 0 to 1; optionally ``coordinates``: "normalised", which is the
        default, or "pixels", for which ``image_size``, width and height, is read.

    Returns:
      A score that has extracted the point as [x, y], normalised.

    Raises:
      KeyError, ValueError: for a key that is missing or has another value, naming it.
    """
    box = numbers_of(record, "bbox_xyxy_norm", 4)
    convention = record.get("coordinates", "normalised")
    if convention not in ("normalised", "pixels"):
        raise ValueError(f'coordinates: expected "normalised" or "pixels", found {convention!r:.100}')
    width, height = _image_size(record) if convention == "pixels" else (1.0, 1.0)
    point = _point(answer_of(prediction))
    if point is None or not all(map(math.isfinite, point)):
        return UNPARSED
    point = [point[0] / width, point[1] / height]
    return compared(_inside(point, box), point, "in the box")


def screenspot_bbox(prediction: str, record: Mapping[str, Any]) -> Score:
    """Test if the centre of a predicted box is in a box, as "Center_ACC" of the task "screenspot_rec" of lmms-eval.

    The box is the first group of four numbers with commas in brackets, as [x1, y1, x2, y2] from 0 to 1.

    Args:
      prediction: The reply.
      record: ``bbox_xyxy_norm``: the reference, from 0 to 1.

    Returns:
      A score that has extracted the box, with the intersection over union in its reason.

    Raises:
      KeyError, ValueError: for a record without a usable ``bbox_xyxy_norm``.
    """
    reference = numbers_of(record, "bbox_xyxy_norm", 4)
    match = _REC_BOX.search(answer_of(prediction))
    box = [float(each) for each in match.groups()] if match else []
    if not box or not all(map(math.isfinite, box)):
        return UNPARSED
    score = compared(_inside(_centre(box), reference), box, "centred in the box")
    return Score(score.value, box, f"{score.reason}, IoU {intersection_over_union(box, reference):.3f}")


def screenspot_pixel_click(prediction: str, record: Mapping[str, Any]) -> Score:
    """Test if ``click(x=…, y=…)`` is in a box, borders included, as VLMEvalKit's ScreenSpot-v2; always in pixels.

    Args:
      prediction: The reply.
      record: ``bbox_xywh_px``: the reference as left, top, width and height; ``image_size``: width and height.

    Returns:
      A score that has extracted the point as [x, y], in pixels.

    Raises:
      KeyError, ValueError: for a key that is missing or has another value, naming it.
    """
    left, top, wide, high = numbers_of(record, "bbox_xywh_px", 4)
    width, height = _image_size(record)
    # The last pixel is inside. VLMEvalKit takes an edge at -1 for one at 0.
    edges = [0.0 if each == -1 else each for each in (left, top, left + wide - 1, top + high - 1)]
    box = [edges[0] / width, edges[1] / height, edges[2] / width, edges[3] / height]
    match = _CLICK.search(answer_of(prediction))
    try:
        point = [float(match[1]), float(match[2])] if match else []
    except ValueError:  # 1.2.3
        point = []
    if not point or not all(map(math.isfinite, point)):
        return UNPARSED
    return compared(_inside([point[0] / width, point[1] / height], box), point, "in the box")


def intersection_over_union(box: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of two boxes as (x1, y1, x2, y2), from 0 to 1; 0 for a box without area."""
    wide = max(0.0, min(box[2], other[2]) - max(box[0], other[0]))
    high = max(0.0, min(box[3], other[3]) - max(box[1], other[1]))
    areas = [max(0.0, each[2] - each[0]) * max(0.0, each[3] - each[1]) for each in (box, other)]
    union = sum(areas) - wide * high
    return wide * high / union if math.isfinite(union) and union > 0 else 0.0


def _point(reply: str) -> list[float] | None:
    inside = _in_tag(reply)
    numbers = [each[0] for _, each in zip(range(4), _NUMBERS.finditer(inside), strict=False)]
    if len(numbers) == 4:
        return _centre([_value(each) for each in numbers])
    if match := _PAIR.search(reply):
        return [_value(match[1]), _value(match[2])]
    if (x := _X.search(reply)) and (y := _Y.search(reply, x.end())):
        return [_value(x[1]), _value(y[1])]
    if match := _BARE_BOX.search(reply) or re.fullmatch(rf"\s*+{_FOUR}\s*+", reply):
        return _centre([_value(each) for each in match.groups()])
    numbers = [each[0] for _, each in zip(range(4), _NUMBERS.finditer(reply), strict=False)]
    if len(numbers) == 4 and any(word in reply.lower() for word in ("box", "rect")):
        return _centre([_value(each) for each in numbers])
    return [_value(each) for each in numbers[:2]] if len(numbers) >= 2 else None


def _in_tag(reply: str) -> str:
    """The text in ``<bbox>`` and ``</bbox>``; "" for none."""
    tag = _TAG.search(reply)
    start = reply.find(">", tag.end()) + 1 if tag else 0
    end = _END_TAG.search(reply, start) if start else None
    return reply[start : end.start()] if end else ""


def _value(text: str) -> float:
    return float(text[:-1]) / 100 if text.endswith("%") else float(text)


def _centre(box: Sequence[float]) -> list[float]:
    return [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2]


def _inside(point: Sequence[float], box: Sequence[float]) -> bool:
    return box[0] <= point[0] <= box[2] and box[1] <= point[1] <= box[3]


def _image_size(record: Mapping[str, Any]) -> list[float]:
    size = numbers_of(record, "image_size", 2)
    if min(size) <= 0:
        raise ValueError(f"image_size: expected a width and a height above 0, found {record['image_size']!r:.100}")
    return size
