"""MMMU (val): college exams in 30 subjects, with images inside of questions and options (arXiv 2311.16502)."""

import dataclasses
import re
from collections.abc import Sequence

from phivision_jax.evaluation import scoring
from phivision_jax.evaluation.benchmark import Item, Published, Scored
from phivision_jax.evaluation.benchmarks.prompts import multiple_choice, plain
from phivision_jax.evaluation.scoring import Score
from phivision_jax.evaluation.tables.benchmark import TableBenchmark
from phivision_jax.evaluation.tables.locate import Files
from phivision_jax.evaluation.tables.row import Row, lettered
from phivision_jax.text.constants import IMAGE_MARKER

_MARKER = re.compile(r"<image (\d)>")


class MMMU(TableBenchmark):
    """900 questions, of which about one in twenty is open."""

    name, title, download = "mmmu", "MMMU (val)", "MMMU/MMMU"
    files = Files(parquet=("validation",), tsv=("MMMU_DEV_VAL.tsv",))
    images = (*(f"image_{k}" for k in range(1, 8)), "image")
    published = Published(54.3, "README of the released code", "VLMEvalKit asks a judge where its rule finds no letter")

    def item(self, row: Row) -> Item | None:
        if row.optional("split") not in (None, "validation"):
            return None
        options = row.options() or lettered(row.strings("options") if row.optional("options") else [])
        id, answer = row.text("id", "index"), row.text("answer")
        is_list = answer.startswith("[") and not options
        record = {"options": list(options.values()), "answer": row.strings("answer") if is_list else answer}
        subject = str(row.optional("category") or id.removeprefix("validation_").rpartition("_")[0])
        shown = {letter: plain(option) for letter, option in options.items()}
        question = multiple_choice(plain(row.text("question")), shown, hint=row.hint)
        return Item(id, question, (), record, {"subject": subject} if subject else {})

    def complete(self, item: Item, row: Row, images: tuple[bytes, ...]) -> Item:
        """Put the images where the question has ``<image 1>``; images that it does not name are left out."""
        if not (named := [int(number) for number in _MARKER.findall(item.question)]):
            return super().complete(item, row, images)
        if not 1 <= min(named) <= max(named) <= len(images):
            raise ValueError(f"the question names image {max(named)}, but the row has {len(images)}")
        question = _MARKER.sub(IMAGE_MARKER, item.question)
        return dataclasses.replace(item, question=question, images=tuple(images[k - 1] for k in named))

    def score(self, prediction: str, item: Item) -> Score:
        rule = scoring.mmmu_mc if item.record["options"] else scoring.mmmu_open
        return rule(prediction, item.record)

    def summary(self, scored: Sequence[Scored]) -> dict[str, float]:
        """Also "unparsed", the number of replies of which the official scorer would guess an option."""
        unparsed = sum(each.score.extracted is None for each in scored)
        return super().summary(scored) | {"unparsed": float(unparsed)}
