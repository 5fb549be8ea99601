"""ChartQA: questions about charts, half of them written by people; relaxed accuracy (arXiv 2203.10244)."""

from collections.abc import Sequence

from phivision_jax.evaluation import scoring
from phivision_jax.evaluation.benchmark import Item, Published, Scored
from phivision_jax.evaluation.benchmarks.prompts import plain
from phivision_jax.evaluation.scoring import Score
from phivision_jax.evaluation.tables.benchmark import TableBenchmark, means
from phivision_jax.evaluation.tables.locate import Files
from phivision_jax.evaluation.tables.row import Row, python_list

_HUMAN = ("0", "human", "human_test", "test_human")
_AUGMENTED = ("1", "machine", "augmented_test", "test_augmented", "augmented")


class ChartQA(TableBenchmark):
    """The test split: 1,250 questions of people and 1,250 that were generated."""

    name, title, download = "chartqa", "ChartQA", "HuggingFaceM4/ChartQA"
    files = Files(parquet=("test",), tsv=("ChartQA_TEST.tsv",))
    published = Published(83.3, "model card", "the harness and its prompt are not stated")

    def item(self, row: Row) -> Item:
        answer = row.value("label", "answer")
        is_list = isinstance(answer, list) or python_list(str(answer)) is not None
        answers = row.strings("label", "answer") if is_list else row.text("label", "answer")
        origin = str(row.optional("human_or_machine", "type", "split")).lower()
        split = "human" if origin in _HUMAN else "augmented" if origin in _AUGMENTED else ""
        question = plain(row.text("query", "question")) + "\nAnswer the question using a single word or phrase."
        return Item(row.id, question, (), {"answer": answers}, {"split": split} if split else {})

    def score(self, prediction: str, item: Item) -> Score:
        return scoring.chartqa_relaxed(prediction, item.record)

    def summary(self, scored: Sequence[Scored]) -> dict[str, float]:
        return super().summary(scored) | means(scored, "split")
