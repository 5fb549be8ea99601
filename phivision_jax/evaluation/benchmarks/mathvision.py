"""MathVision (testmini): problems of mathematics competitions (arXiv 2402.14804)."""

from collections.abc import Sequence

from phivision_jax.evaluation import scoring
from phivision_jax.evaluation.benchmark import Item, Published, Scored
from phivision_jax.evaluation.benchmarks import judging
from phivision_jax.evaluation.benchmarks.prompts import plain
from phivision_jax.evaluation.scoring import Score
from phivision_jax.evaluation.tables.benchmark import TableBenchmark, means
from phivision_jax.evaluation.tables.locate import Files
from phivision_jax.evaluation.tables.row import Row, lettered

_INSTRUCTION = 'Please solve the problem step by step and put your answer in one "\\boxed{}".'


class MathVision(TableBenchmark):
    """304 problems."""

    name, title, download = "mathvision", "MathVision (testmini)", "MathLLMs/MathVision"
    files = Files(parquet=("testmini",), tsv=("MathVision_MINI.tsv",))
    images = ("decoded_image", "image")
    published = Published(36.2, "README of the released code", "a judge extracts answers; without one the rule does")
    judged = True

    def item(self, row: Row) -> Item:
        question = plain(row.text("question"))
        column = "options" if "options" in row.values else "choices"
        options = row.strings(column) if row.optional(column) else []
        if column == "options":  # VLMEvalKit's table has them, and a hint, in the question
            choices = "\n".join(f"{letter}. {option}" for letter, option in lettered(options).items())
            question = _INSTRUCTION + question + f"\nChoices: {choices}" * bool(options)
        answer = row.text("answer").strip()
        record = {"answer": answer, "options": options if answer in lettered(options) else []}
        subject = row.optional("subject", "category")
        return Item(row.text("id", "index"), question, (), record, {"subject": str(subject)} if subject else {})

    def score(self, prediction: str, item: Item) -> Score:
        return scoring.mathvision_equal(prediction, item.record)

    def judge_prompt(self, prediction: str, item: Item) -> str | None:
        """The request to extract the answer, unless the rule accepts the reply as it is."""
        return None if self.score(prediction, item).value == 1 else judging.extraction(item.question, prediction)

    def judge_score(self, judge_reply: str, item: Item) -> Score:
        return scoring.mathvision_equal(judging.extracted(judge_reply), item.record)

    def summary(self, scored: Sequence[Scored]) -> dict[str, float]:
        return super().summary(scored) | means(scored, "subject")
