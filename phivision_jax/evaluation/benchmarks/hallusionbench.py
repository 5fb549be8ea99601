"""HallusionBench: yes-or-no questions on figures and on edited ones (arXiv 2310.14566)."""

from collections.abc import Sequence

from phivision_jax.evaluation import scoring
from phivision_jax.evaluation.benchmark import Item, Published, Scored
from phivision_jax.evaluation.benchmarks.prompts import plain
from phivision_jax.evaluation.scoring import Score
from phivision_jax.evaluation.tables.benchmark import TableBenchmark
from phivision_jax.evaluation.tables.locate import Files
from phivision_jax.evaluation.tables.row import Row

_ANSWERS = {"0": "No", "1": "Yes", "no": "No", "yes": "Yes"}


class HallusionBench(TableBenchmark):
    """The 951 questions with an image; those without one are not part of the published score."""

    name, title, download = "hallusionbench", "HallusionBench", "lmms-lab/HallusionBench"
    files = Files(parquet=("image",), tsv=("HallusionBench.tsv",))
    published = Published(
        64.4, "README of the released code", "it is not stated which of aAcc, fAcc and qAcc, or a mean"
    )

    def item(self, row: Row) -> Item:
        given = row.text("gt_answer", "answer").strip().lower()
        if given not in _ANSWERS:
            raise row.error("gt_answer", f"is {given!r:.60}, neither 0 nor 1")
        fields = ("set_id", "figure_id", "question_id")
        if row.optional("set_id") is None:  # VLMEvalKit has them in the index: hallusion_VD_illusion_0_1_2
            parts = row.text("index").split("_")
            if len(parts) < 6:
                raise row.error("index", f"is {row.text('index')!r:.60}, without set, figure and question")
            ids = dict(zip(fields, parts[3:6], strict=True))
        else:
            ids = {field: row.text(field) for field in fields}
        record = {"answer": _ANSWERS[given], "category": row.text("category")}
        fine = row.text("subcategory", "l2-category")
        # VLMEvalKit's groups are those of "VD_ocr"; the data set writes "ocr" for VD and VS.
        fine = fine if fine.startswith(record["category"]) else f"{record['category']}_{fine}"
        record |= {"l2_category": fine, **ids}
        groups = {"category": record["category"], "l2_category": record["l2_category"]}
        return Item(row.id, plain(row.text("question")), (), record, groups, f"{fine}_{ids['set_id']}")

    def score(self, prediction: str, item: Item) -> Score:
        return scoring.hallusion_yesno(prediction, item.record)

    def summary(self, scored: Sequence[Scored]) -> dict[str, float]:
        """The mean of aAcc, fAcc and qAcc as the score, as the leaderboard of VLMEvalKit shows it."""
        rows = [{**each.item.record, "correct": each.score.value == 1} for each in scored]
        figures = {name: 100 * value for name, value in scoring.hallusion_groups(rows).items()}
        return {"score": sum(figures.values()) / max(len(figures), 1)} | figures
