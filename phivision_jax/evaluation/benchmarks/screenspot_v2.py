"""ScreenSpot-v2: elements in screenshots of desktops, phones and web pages (arXiv 2410.23218)."""

from typing import ClassVar

from phivision_jax.evaluation.benchmark import Published
from phivision_jax.evaluation.benchmarks.grounding import Grounding
from phivision_jax.evaluation.tables.locate import Files
from phivision_jax.evaluation.tables.row import Row

PLATFORMS = ("desktop", "mobile", "web")
_SOURCE = "README of the released code"


class ScreenSpotV2(Grounding):
    """1,272 instructions."""

    name, title, download = "screenspot_v2", "ScreenSpot-v2", "OS-Copilot/ScreenSpot-v2"
    files = Files(
        tsv=tuple(f"ScreenSpot_v2_{platform.capitalize()}.tsv" for platform in PLATFORMS),
        json=tuple(f"screenspot_{platform}_v2.json" for platform in PLATFORMS),
        json_images="screenspotv2_image",
        then=", and unpack screenspotv2_image.zip in it",
    )
    published = Published(88.2, "model card", "the prompt is not published; ours asks for the released format")
    published_groups: ClassVar = {
        "desktop": Published(87.1, _SOURCE),
        "mobile": Published(88.6, _SOURCE),
        "web": Published(88.8, _SOURCE),
    }

    def corners(self, row: Row) -> list[float]:
        """From left, top, width and height; the last pixel belongs to the box, as VLMEvalKit scores points."""
        left, top, width, height = row.box("bbox")
        return [left, top, left + max(width - 1, 0), top + max(height - 1, 0)]

    def groups(self, row: Row) -> dict[str, str]:
        name = row.file.stem.lower()
        platform = next((platform for platform in PLATFORMS if platform in name), "")
        return {"platform": platform, "type": row.text("data_type")}
