"""MMStar: questions that need their image, in six capabilities (arXiv 2403.20330)."""

from collections.abc import Sequence

from phivision_jax.evaluation import scoring
from phivision_jax.evaluation.benchmark import Item, Published, Scored
from phivision_jax.evaluation.benchmarks.prompts import LETTER_ONLY, multiple_choice, plain, split_options
from phivision_jax.evaluation.scoring import Score
from phivision_jax.evaluation.tables.benchmark import TableBenchmark, means
from phivision_jax.evaluation.tables.locate import Files
from phivision_jax.evaluation.tables.row import Row


class MMStar(TableBenchmark):
    """1,500 questions."""

    name, title, download = "mmstar", "MMStar", "Lin-Chen/MMStar"
    files = Files(parquet=("val", "mmstar"), tsv=("MMStar.tsv",))
    published = Published(64.5, "README of the released code", "VLMEvalKit asks a judge where its rule finds no letter")

    def item(self, row: Row) -> Item:
        text, options = plain(row.text("question")), row.options()
        prompt = multiple_choice(text, options, hint=row.hint) if options else f"{text.strip()}\n{LETTER_ONLY}"
        # Without options that can be found, only a letter is understood.
        options = options or split_options(text) or {letter: letter for letter in "ABCD"}
        record = {"options": options, "answer": row.text("answer").strip()}
        groups = row.groups("category", "l2_category", "l2-category")
        return Item(row.id, prompt, (), record, {name.replace("-", "_"): value for name, value in groups.items()})

    def score(self, prediction: str, item: Item) -> Score:
        return scoring.mcq(prediction, item.record)

    def summary(self, scored: Sequence[Scored]) -> dict[str, float]:
        """Mean of all items, as VLMEvalKit's score; "l2_mean" is that of the finer categories, lmms-eval's."""
        fine = means(scored, "l2_category")
        figures = super().summary(scored) | {"l2_mean": sum(fine.values()) / max(len(fine), 1)}
        return figures | means(scored, "category")
