"""V*Bench: small details of large photos, as multiple choice (arXiv 2312.14135)."""

from collections.abc import Sequence

from phivision_jax.evaluation import scoring
from phivision_jax.evaluation.benchmark import Item, Scored
from phivision_jax.evaluation.benchmarks.prompts import LETTER_ONLY, multiple_choice, plain, split_options
from phivision_jax.evaluation.scoring import Score
from phivision_jax.evaluation.tables.benchmark import TableBenchmark, means
from phivision_jax.evaluation.tables.locate import Files
from phivision_jax.evaluation.tables.row import Row


class VStar(TableBenchmark):
    """191 questions about an attribute or a position."""

    name, title, download = "vstar", "V*Bench", "craigwu/vstar_bench"
    files = Files(parquet=("test",), tsv=("VStarBench.tsv",), json=("test_questions.jsonl",))

    def item(self, row: Row) -> Item:
        text, options = plain(row.text("text", "question")), row.options()
        if not options:
            options = split_options(text.replace(LETTER_ONLY, ""))
            text = text.partition("(A)")[0].strip()
        if (answer := row.text("label", "answer").strip()) not in options:
            raise row.error("label", f"is {answer!r:.60}, none of the options {', '.join(options) or 'in the text'}")
        record = {"options": options, "answer": answer}
        question = multiple_choice(text, options, hint=row.hint)
        return Item(row.id, question, (), record, row.groups("category"))

    def score(self, prediction: str, item: Item) -> Score:
        return scoring.mcq(prediction, item.record)

    def summary(self, scored: Sequence[Scored]) -> dict[str, float]:
        return super().summary(scored) | means(scored, "category")
