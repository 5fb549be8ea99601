"""ZEROBench (subquestions): steps towards questions that models could not answer (arXiv 2502.09696)."""

from phivision_jax.evaluation import scoring
from phivision_jax.evaluation.benchmark import Item, Published
from phivision_jax.evaluation.benchmarks.prompts import plain
from phivision_jax.evaluation.scoring import Score
from phivision_jax.evaluation.tables.benchmark import TableBenchmark
from phivision_jax.evaluation.tables.locate import Files
from phivision_jax.evaluation.tables.row import Row

_INSTRUCTION = " \n\n\nLet's think step by step and give the final answer in curly braces,  like this: {final answer}"
"""As VLMEvalKit writes it, spaces included."""


class ZeroBench(TableBenchmark):
    """334 subquestions, some with several images."""

    name, title, download = "zerobench", "ZEROBench (sub)", "jonathan-roberts1/zerobench"
    files = Files(parquet=("zerobench_subquestions",), tsv=("ZEROBench_sub.tsv", "zerobench_sub.tsv"))
    images = ("question_images_decoded", "image")
    published = Published(17.7, "README of the released code")

    def item(self, row: Row) -> Item:
        question = plain(row.text("question_text", "question")) + _INSTRUCTION
        record = {"answer": row.text("question_answer", "answers", "answer")}
        return Item(row.text("question_id", "index"), question, (), record)

    def score(self, prediction: str, item: Item) -> Score:
        return scoring.zerobench_braces(prediction, item.record)
