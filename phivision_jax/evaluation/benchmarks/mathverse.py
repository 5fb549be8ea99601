"""MathVerse (testmini): problems in versions with ever less text, which the image replaces (arXiv 2403.14624)."""

from collections.abc import Sequence

from phivision_jax.evaluation import scoring
from phivision_jax.evaluation.benchmark import Item, Published, Scored
from phivision_jax.evaluation.benchmarks import judging
from phivision_jax.evaluation.benchmarks.prompts import plain, split_options
from phivision_jax.evaluation.scoring import Score
from phivision_jax.evaluation.tables.benchmark import TableBenchmark, means
from phivision_jax.evaluation.tables.locate import Files
from phivision_jax.evaluation.tables.row import Row


class MathVerse(TableBenchmark):
    """788 problems in five versions that have an image."""

    name, title, download = "mathverse", "MathVerse (testmini)", "AI4Math/MathVerse"
    files = Files(parquet=("testmini",), tsv=("MathVerse_MINI.tsv",))
    published = Published(44.9, "README of the released code", "a judge compares answers; the rule alone is stricter")
    judged = True

    def item(self, row: Row) -> Item | None:
        if (version := row.text("problem_version")) == "Text Only":
            return None
        asked = row.text("question_for_eval", "question")
        options, answer = split_options(asked.partition("Choices:")[2]), row.text("answer").strip()
        record = {"answer": answer, "options": [*options.values()] if answer in options else [], "question": asked}
        groups = {"version": version} | row.groups("question_type")
        problem = str(row.optional("problem_index") or "")
        return Item(row.text("sample_index", "index"), plain(row.text("question")), (), record, groups, problem)

    def score(self, prediction: str, item: Item) -> Score:
        return scoring.mathvision_equal(prediction, item.record)

    def judge_prompt(self, prediction: str, item: Item) -> str | None:
        if prediction.strip() == item.record["answer"]:
            return None
        return judging.comparison(item.record["question"], prediction, item.record["answer"])

    def judge_score(self, judge_reply: str, item: Item) -> Score:
        return judging.verdict(judge_reply)

    def summary(self, scored: Sequence[Scored]) -> dict[str, float]:
        return super().summary(scored) | means(scored, "version")
