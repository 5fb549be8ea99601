"""ScreenSpot-Pro: small elements in screenshots of professional software (arXiv 2504.07981)."""

from phivision_jax.evaluation.benchmarks.grounding import Grounding
from phivision_jax.evaluation.tables.locate import Files
from phivision_jax.evaluation.tables.row import Row

_GROUPS = ("Development", "Creative", "CAD", "Scientific", "Office", "OS")


class ScreenSpotPro(Grounding):
    """1,581 instructions."""

    name, title, download = "screenspot_pro", "ScreenSpot-Pro", "likaixin/ScreenSpot-Pro"
    files = Files(
        tsv=tuple(f"ScreenSpot_Pro_{group}.tsv" for group in _GROUPS),
        json=("annotations/*.json",),
        json_images="images",
    )

    def corners(self, row: Row) -> list[float]:
        return row.box("bbox")

    def groups(self, row: Row) -> dict[str, str]:
        group = row.optional("group") or row.file.stem.removeprefix("ScreenSpot_Pro_")
        return {"group": str(group), "type": row.text("ui_type")}
