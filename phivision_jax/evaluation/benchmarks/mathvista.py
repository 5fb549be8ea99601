"""MathVista (testmini): mathematics in images (arXiv 2310.02255), scored by VLMEvalKit's rules."""

from typing import Any

from phivision_jax.evaluation import scoring
from phivision_jax.evaluation.benchmark import Item, Published
from phivision_jax.evaluation.benchmarks import judging
from phivision_jax.evaluation.benchmarks.prompts import plain
from phivision_jax.evaluation.scoring import Score
from phivision_jax.evaluation.tables.benchmark import TableBenchmark
from phivision_jax.evaluation.tables.locate import Files
from phivision_jax.evaluation.tables.row import Row, lettered

_CHOICE = "multi_choice"


class MathVista(TableBenchmark):
    """1,000 questions: a choice, an integer, a decimal number, or a list."""

    name, title, download = "mathvista", "MathVista (testmini)", "AI4Math/MathVista"
    files = Files(parquet=("testmini",), tsv=("MathVista_MINI.tsv",))
    images = ("decoded_image", "image")
    published = Published(75.2, "README of the released code", "a judge extracts answers; without one the rule does")
    judged = True

    def item(self, row: Row) -> Item:
        kind, choices, answer = row.text("question_type"), list[str](), row.text("answer")
        option = row.optional("answer_option")
        if kind == _CHOICE:
            choices = row.strings("choices")
            letters = [letter for letter, choice in lettered(choices).items() if choice == answer]
            option = str(option or (letters or [""])[0])
            if not option:
                raise row.error("answer", "is none of the choices")
        # The column is a float, which Python's round refuses as a number of digits; VLMEvalKit does not need it.
        has_precision = row.optional("precision") is not None
        precision = row.integer("precision") if has_precision else len(answer.partition(".")[2])
        record: dict[str, Any] = {
            "question_type": kind, "answer_type": row.text("answer_type"), "choices": choices, "precision": precision,
            "answer": answer, "answer_option": option or "",
        }  # fmt: skip
        groups = {"question_type": kind, "answer_type": str(record["answer_type"])}
        return Item(row.text("pid", "index"), plain(row.text("query", "question")), (), record, groups)

    def score(self, prediction: str, item: Item) -> Score:
        """VLMEvalKit's inference; of questions without choices, MathVista's normalisation where it infers nothing.

        The nearest choice by edit distance, which MathVista takes of an extracted answer, would be a guess of a reply.
        """
        rule = scoring.mathvista_prefetch if item.record["choices"] else scoring.mathvista_normalize
        return _inferred(prediction, item) or rule(prediction, item.record)

    def judge_prompt(self, prediction: str, item: Item) -> str | None:
        """The request to extract the answer: of a choice where no letter is inferred, else of all but right answers."""
        return None if _inferred(prediction, item) else judging.extraction(item.question, prediction)

    def judge_score(self, judge_reply: str, item: Item) -> Score:
        if not (answer := judging.extracted(judge_reply)):
            return Score(0.0, None, "the judge found no answer")
        return _inferred(answer, item) or scoring.mathvista_normalize(answer, item.record)


def _inferred(answer: str, item: Item) -> Score | None:
    """VLMEvalKit's inference where it is final: a letter, or the right number."""
    inferred = scoring.mathvista_prefetch(answer, item.record)
    return inferred if inferred.value == 1 or (item.record["choices"] and inferred.extracted is not None) else None
