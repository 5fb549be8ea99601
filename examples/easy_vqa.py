"""easy-VQA as a benchmark of one's own: 9,673 questions about 1,000 images, answered in one word.

    phivision eval runs/easy_vqa --benchmarks=examples/easy_vqa.py

It scores the model that ``demo.py`` trains, by the rule and with the images of training.
"""

from collections.abc import Sequence

from phivision_jax.data.sources.easy_vqa import easy_vqa
from phivision_jax.evaluation.benchmark import Benchmark, Item
from phivision_jax.evaluation.scoring import Score, exact_match


class EasyVQA(Benchmark):
    """The test split; the questions on one image are a cluster."""

    name, title = "easy_vqa", "easy-VQA"
    max_new_tokens = 16

    def items(self, path: str) -> Sequence[Item]:
        """The questions of the installed package; ``path`` is not needed."""
        items = []
        for record in easy_vqa("test"):
            question, answer = (message["content"] for message in record.messages)
            image = record.id.rpartition("/")[0]
            images = tuple(each for each in record.images if isinstance(each, bytes))
            items.append(Item(record.id, question, images, {"answer": answer}, cluster=image))
        return items

    def score(self, prediction: str, item: Item) -> Score:
        is_right = exact_match(prediction, item.record["answer"])
        return Score(float(is_right), prediction.strip(), "equal" if is_right else "another answer")
