"""We-Math: problems of two or three steps, asked in one and step by step (arXiv 2407.01284)."""

from collections.abc import Sequence

from phivision_jax.evaluation import scoring
from phivision_jax.evaluation.benchmark import Item, Published, Scored
from phivision_jax.evaluation.benchmarks.prompts import multiple_choice, plain, split_options
from phivision_jax.evaluation.scoring import Score
from phivision_jax.evaluation.tables.benchmark import TableBenchmark
from phivision_jax.evaluation.tables.locate import Files
from phivision_jax.evaluation.tables.row import Row

STEPS = {"2": ("1", "2", "multi"), "3": ("1", "2", "3", "multi")}
"""Parts of the keys of a problem: "2steps_1", "2steps_2" and "2steps_multi"."""


class WeMath(TableBenchmark):
    """1,740 questions of 525 problems."""

    name, title, download = "wemath", "We-Math", "We-Math/We-Math"
    files = Files(parquet=("testmini",), tsv=("WeMath.tsv",))
    images = ("image_path", "image")
    published = Published(50.1, "README of the released code", "it is not stated whether strict or loose")

    def item(self, row: Row) -> Item:
        steps, _, part = (key := row.text("key")).partition("steps_")
        if part not in STEPS.get(steps, ()):
            raise row.error("key", f"is {key!r:.60}, not such as 2steps_1 or 3steps_multi")
        answer, id = row.text("answer").strip(), row.text("ID", "id")
        options = row.options() or split_options(row.text("option"))
        question = multiple_choice(plain(row.text("question")), options, hint=row.hint, closing=False)
        if answer not in options:  # they are written in another way; the rule needs the letter alone
            question = multiple_choice(plain(row.text("question")), {}) + f"Options:\n{row.text('option')}\n"
        record = {"answer": answer, "key": key}
        return Item(f"{id}/{key}", question, (), record, {"steps": steps}, f"{id}/{steps}")

    def score(self, prediction: str, item: Item) -> Score:
        return scoring.wemath_letter(prediction, item.record)

    def summary(self, scored: Sequence[Scored]) -> dict[str, float]:
        """The four dimensions in per cent over the problems of which every part was asked, strict and loose.

        The strict score is "score"; it is 0 where no problem is complete, as in a small sample.
        """
        problems: dict[str, dict[str, int]] = {}
        for each in scored:
            part = each.item.record["key"].partition("steps_")[2]
            problems.setdefault(each.item.cluster, {})[part] = int(each.score.value)
        rows: dict[str, list[list[int]]] = {steps: [] for steps in STEPS}
        for cluster, parts in problems.items():
            if len(parts) == len(names := STEPS[cluster.rpartition("/")[2]]):
                rows[cluster.rpartition("/")[2]].append([parts[name] for name in names])
        complete = len(rows["2"]) + len(rows["3"])
        found = scoring.wemath_four_dim(rows["2"], rows["3"]) if complete else {}
        figures = {f"{kind} {name}": 100 * value for kind in found for name, value in found[kind].items()}
        accuracy = super().summary(scored)["score"]
        return {"score": figures.get("strict score", 0.0), "problems": float(complete), "accuracy": accuracy} | figures
