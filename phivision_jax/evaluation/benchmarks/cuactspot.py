"""CUActSpot: clicks and drags on canvases, interfaces, images, tables and texts (github.com/microsoft/Phi-Ground).

An annotation has polygons in pixels. Those of type Target with a rank have to be hit by the point of that number;
without ranks, each by any point. A point in a Banned polygon is wrong.
"""

import dataclasses
from collections.abc import Sequence

from phivision_jax.evaluation.benchmark import Item, Scored
from phivision_jax.evaluation.benchmarks.prompts import plain
from phivision_jax.evaluation.scoring import Score
from phivision_jax.evaluation.tables.benchmark import TableBenchmark, means
from phivision_jax.evaluation.tables.locate import Files
from phivision_jax.evaluation.tables.row import Row
from phivision_jax.images.decode import image_size
from phivision_jax.inference.grounding import find

type Point = tuple[float, float]

_INSTRUCTION = (
    "Identify the point or points in the screenshot that are needed to complete the instruction, in order. "
    "Output each point in the format of [x, y] using relative coordinates from 0.0000 to 1.0000, and nothing else."
)
_LONGEST, _MOST_POINTS = 20_000, 100


class CUActSpot(TableBenchmark):
    """208 instructions, of which about three quarters need two points or more."""

    name, title, download = "cuactspot", "CUActSpot", "https://github.com/microsoft/Phi-Ground"
    _folders = ("", "data/ActSpot/", "benchmark/CUActSpot/data/ActSpot/")
    files = Files(json=tuple(f"{folder}*.json" for folder in _folders))
    images = ()

    def item(self, row: Row) -> Item:
        id, polygons = row.text("image_id"), row.value("polygons")
        if not isinstance(polygons, list) or not all(map(_is_polygon, polygons)):
            raise row.error("polygons", "is not a list of polygons with type, rank and points")
        kept = [{name: polygon[name] for name in ("type", "rank", "points")} for polygon in polygons]
        question = f"The instruction:\n{plain(row.text('task_en', 'task'))}\n\n{_INSTRUCTION}"
        modality = str(row.optional("modality") or id.partition("-")[0])
        return Item(id, question, (), {"polygons": kept}, {"modality": modality})

    def complete(self, item: Item, row: Row, images: tuple[bytes, ...]) -> Item:
        names = [item.id + ending for ending in (".png", ".jpg", ".jpeg", ".webp")]
        images = row.read([next((name for name in names if (row.folder / name).is_file()), names[0])])
        record = {**item.record, "image_size": list(image_size(images[0]))}
        return dataclasses.replace(item, images=images, record=record)

    def score(self, prediction: str, item: Item) -> Score:
        width, height = item.record["image_size"]
        marks = find(prediction[-_LONGEST:], (width, height))[:_MOST_POINTS]
        points = [((mark.xy[0] + mark.xy[-2]) / 2, (mark.xy[1] + mark.xy[-1]) / 2) for mark in marks]
        problem = _problem(points, item.record["polygons"])
        return Score(float(not problem), [list(point) for point in points] or None, problem or "every target is hit")

    def summary(self, scored: Sequence[Scored]) -> dict[str, float]:
        return super().summary(scored) | means(scored, "modality")


def _is_polygon(given: object) -> bool:
    if not isinstance(given, dict) or given.get("type") not in ("Target", "Banned"):
        return False
    rank, points = given.get("rank"), given.get("points")
    is_ranked = isinstance(rank, str) and (not rank or (rank.isascii() and rank.isdigit() and 0 < int(rank[:3]) < 100))
    if not is_ranked or not isinstance(points, list) or not all(isinstance(point, list) for point in points):
        return False
    numbers = [number for point in points for number in point if type(number) in (int, float) and abs(number) < 1e6]
    return all(len(point) == 2 for point in points) and len(numbers) == 2 * len(points)


def _problem(points: Sequence[Point], polygons: Sequence[dict]) -> str:
    """Why points do not complete an instruction; "" if they do."""
    targets = [polygon for polygon in polygons if polygon["type"] == "Target"]
    for polygon in polygons:
        if polygon["type"] == "Banned" and any(_contains(polygon["points"], point) for point in points):
            return "a point is in a banned region"
    if len({bool(polygon["rank"]) for polygon in targets}) > 1:
        return "only some targets have a rank"
    if not all(polygon["rank"] for polygon in targets):
        missed = sum(not any(_contains(polygon["points"], point) for point in points) for polygon in targets)
        return f"{missed} of {len(targets)} targets are not hit" if missed else ""
    for rank in range(1, max((int(polygon["rank"]) for polygon in targets), default=0) + 1):
        ranked = [polygon["points"] for polygon in targets if polygon["rank"] == str(rank)]
        if len(points) < rank or not any(_contains(corners, points[rank - 1]) for corners in ranked):
            return f"point {rank} is missing" if len(points) < rank else f"point {rank} is in no target of its rank"
    return ""


def _contains(corners: Sequence[Sequence[float]], point: Point) -> bool:
    """True for a point inside of a polygon or on its border (the even-odd rule)."""
    x, y = point
    inside = False
    for (x1, y1), (x2, y2) in zip(corners, [*corners[1:], *corners[:1]], strict=True):
        cross = (x2 - x1) * (y - y1) - (y2 - y1) * (x - x1)
        if abs(cross) <= 1e-9 and min(x1, x2) <= x <= max(x1, x2) and min(y1, y2) <= y <= max(y1, y2):
            return True
        if (y1 > y) != (y2 > y) and x < x1 + (x2 - x1) * (y - y1) / (y2 - y1):
            inside = not inside
    return inside and len(corners) > 2
