"""OCRBench: text in images, from signs to formulas (arXiv 2305.07895)."""

from collections.abc import Sequence

from phivision_jax.evaluation import scoring
from phivision_jax.evaluation.benchmark import Item, Published, Scored
from phivision_jax.evaluation.benchmarks.prompts import plain
from phivision_jax.evaluation.scoring import Score
from phivision_jax.evaluation.tables.benchmark import TableBenchmark, means
from phivision_jax.evaluation.tables.locate import Files
from phivision_jax.evaluation.tables.row import Row

_FORMULAS = "Handwritten Mathematical Expression Recognition"


class OCRBench(TableBenchmark):
    """1,000 questions of ten types."""

    name, title, download = "ocrbench", "OCRBench", "echo840/OCRBench"
    files = Files(parquet=("test",), tsv=("OCRBench.tsv",))
    published = Published(76.0, "model card", "published of 1,000 points as per cent")

    def item(self, row: Row) -> Item:
        kind = row.text("question_type", "category")
        dataset = row.optional("dataset") or ("HME100k" if kind == _FORMULAS else "")
        given = row.value("answer")
        answers = row.strings("answer") if isinstance(given, list) or str(given).startswith("[") else [str(given)]
        record = {"answers": answers, "dataset": str(dataset), "question_type": kind}
        return Item(row.id, plain(row.text("question")), (), record, {"type": kind})

    def score(self, prediction: str, item: Item) -> Score:
        return scoring.ocrbench(prediction, item.record)

    def summary(self, scored: Sequence[Scored]) -> dict[str, float]:
        return super().summary(scored) | means(scored, "type")
