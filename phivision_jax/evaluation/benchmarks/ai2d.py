"""AI2D: diagrams of school books, whose labels are masked by letters (arXiv 1603.07396)."""

from phivision_jax.evaluation import scoring
from phivision_jax.evaluation.benchmark import Item, Published
from phivision_jax.evaluation.benchmarks.prompts import multiple_choice, plain
from phivision_jax.evaluation.scoring import Score
from phivision_jax.evaluation.tables.benchmark import TableBenchmark
from phivision_jax.evaluation.tables.locate import Files
from phivision_jax.evaluation.tables.row import Row, lettered


class AI2D(TableBenchmark):
    """The test split: 3,088 questions."""

    name, title, download = "ai2d", "AI2D", "lmms-lab/ai2d"
    files = Files(parquet=("test",), tsv=("AI2D_TEST.tsv",))
    published = Published(84.8, "README of the released code", "VLMEvalKit asks a judge where its rule finds no letter")

    def item(self, row: Row) -> Item:
        if options := row.options():
            answer = row.text("answer")
        else:
            options, index = lettered(row.strings("options")), row.integer("answer")
            answer = [*options][index] if 0 <= index < len(options) else str(index)
        if answer not in options:
            raise row.error("answer", f"is {answer!r}, none of {len(options)} options")
        record = {"options": options, "answer": answer}
        question = multiple_choice(plain(row.text("question")), options, hint=row.hint)
        return Item(row.id, question, (), record)

    def score(self, prediction: str, item: Item) -> Score:
        return scoring.mcq(prediction, item.record)
