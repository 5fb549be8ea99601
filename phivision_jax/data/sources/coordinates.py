"""Boxes and points as shares of their image, [0,1] with three decimals: the form that the model was trained on.

    text     "<ref> is at <bbox>, its handle at <point>."
    objects  {"ref": ["the cup"], "bbox": [[64, 30, 128, 90]], "point": [[128, 60]]}        on an image of 640 x 300
    record   "the cup is at [0.100, 0.100, 0.200, 0.300], its handle at [0.200, 0.200]."

Placeholders are replaced in order. ``bbox_type`` gives the unit of the record ("real": pixels, "norm1": shares,
"norm1000": thousandths), in place of the option; any other field with a value is refused. ``image_id`` gives the image
of each box and then of each point; with one image it may be missing. Numbers up to 1 % outside are clipped, because
annotations are rounded. Anything farther outside is rejected, and so is a box whose corners are swapped, which is
probably x, y, width, height.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from phivision_jax.config import typed
from phivision_jax.data.quarantine import BadRecord
from phivision_jax.data.sources.item_options import Unit
from phivision_jax.data.sources.keys import is_blank

TOLERANCE = 0.01
_UNITS: dict[Any, Unit] = {"real": "pixels", "norm1": "unit", "norm1000": "thousand"}
_KINDS: dict[str, Any] = {
    "ref": tuple[str, ...], "bbox": tuple[tuple[float, float, float, float], ...],
    "point": tuple[tuple[float, float], ...], "image_id": tuple[int, ...],
}  # fmt: skip

_PLACEHOLDER = re.compile("<(ref|bbox|point)>")
_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_LIST = re.compile(rf"\[{_NUMBER},{_NUMBER}(?:,{_NUMBER},{_NUMBER})?\]")


def normalised(numbers: Sequence[float], unit: Unit, size: Callable[[], tuple[int, int]]) -> str:
    """ "[x, y]" or "[x1, y1, x2, y2]" in shares of the image.

    Raises:
      BadRecord: "coordinates".
    """
    width, height = size() if unit == "pixels" else (1000, 1000) if unit == "thousand" else (1, 1)
    shares = [number / side for number, side in zip(numbers, (width, height) * 2, strict=False)]
    shown = f"[{', '.join(f'{number:g}' for number in numbers)}]"
    if unit != "unit" and max(numbers) <= 1 and (len(numbers) == 4 or any(number % 1 for number in numbers)):
        raise BadRecord("coordinates", f"{shown} is in shares of the sides, not in {unit}: see --boxes, --inline-boxes")
    if not all(math.isfinite(share) and -TOLERANCE <= share <= 1 + TOLERANCE for share in shares):
        what = f"its image of {width}x{height} pixels" if unit == "pixels" else f"its image, in units of {unit}"
        raise BadRecord("coordinates", f"{shown} is outside {what}")
    if len(shares) == 4 and (shares[0] > shares[2] or shares[1] > shares[3]):
        raise BadRecord("coordinates", f"{shown} is not a box: it must be [left, top, right, bottom]")
    return f"[{', '.join(f'{min(max(0.0, share), 1.0):.3f}' for share in shares)}]"


def fill_placeholders(
    messages: Sequence[dict[str, Any]], objects: Any, unit: Unit, images: int, size_of: Callable[[int], tuple[int, int]]
) -> None:
    """Replace the placeholders in the messages, in place.

    Args:
      messages: with string contents.
      objects: the field of that name.
      unit: of its numbers.
      images: number of images of the record.
      size_of: width and height of one of them.

    Raises:
      BadRecord: "fields" for a field of another form; "unread" for other fields or units; "coordinates" for more or
        fewer placeholders than objects, or for one outside its image.
    """
    if not isinstance(objects, Mapping):
        raise BadRecord("fields", f"objects is {type(objects).__name__}: it must be a dict of lists")
    others = (key for key in objects if key not in (*_KINDS, "bbox_type") and not is_blank(objects[key]))
    if (other := next(others, None)) is not None:
        raise BadRecord("unread", f"objects has the field {other!s:.100}, which may change its boxes: remove it")
    if (stated := objects.get("bbox_type")) is not None:
        if str(stated) not in _UNITS:
            raise BadRecord("unread", f"objects: bbox_type is {stated!r:.100}: it must be one of {', '.join(_UNITS)}")
        unit = _UNITS[str(stated)]
    try:
        given = {kind: typed(objects.get(kind) or [], hint, f"objects: {kind}") for kind, hint in _KINDS.items()}
    except ValueError as error:
        raise BadRecord("fields", str(error)) from None
    boxes, points = given["bbox"], given["point"]
    found = [match[1] for message in messages for match in _PLACEHOLDER.finditer(message["content"])]
    for kind in ("ref", "bbox", "point"):
        if found.count(kind) != len(given[kind]):
            counts = f"{found.count(kind)} <{kind}> in the messages, but {len(given[kind])} in objects"
            raise BadRecord("coordinates", counts)
    where, count = given["image_id"], len(boxes) + len(points)
    if not where and count and unit == "pixels" and images != 1:
        raise BadRecord("coordinates", f"objects in pixels of {images} images: image_id must name them")
    where = where or [0] * count
    if len(where) != count:
        raise BadRecord("coordinates", f"objects: {len(where)} numbers in image_id for {count} boxes and points")
    if given["image_id"] and not all(0 <= i < images for i in where):
        raise BadRecord("coordinates", f"objects: image_id names an image that is not among the {images} of the record")
    sizes = [functools.partial(size_of, image) for image in where]
    shares = [normalised(numbers, unit, size) for numbers, size in zip(boxes + points, sizes, strict=True)]
    values = {"ref": iter(given["ref"]), "bbox": iter(shares[: len(boxes)]), "point": iter(shares[len(boxes) :])}
    for message in messages:
        message["content"] = _PLACEHOLDER.sub(lambda match: next(values[match[1]]), message["content"])


def rewrite_lists(messages: Sequence[dict[str, Any]], unit: Unit, size: Callable[[], tuple[int, int]]) -> None:
    """Rewrite every bracketed list of 2 or 4 numbers in the messages, in place.

    Raises:
      BadRecord: "coordinates" for one outside the image.
    """

    def share(match: re.Match[str]) -> str:
        return normalised([float(number) for number in match.groups() if number is not None], unit, size)

    for message in messages:
        message["content"] = _LIST.sub(share, message["content"])


def find_box(messages: Sequence[Mapping[str, Any]]) -> str | None:
    """A placeholder in the messages of a record, or a list of four numbers that are not shares, as boxes often are."""
    if any("<bbox>" in message["content"] for message in messages):
        return "<bbox>"
    found = (match for message in messages for match in _LIST.finditer(message["content"]) if match[4])
    return next((match[0] for match in found if max(map(float, match.groups())) > 1), None)
