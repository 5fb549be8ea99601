"""The loss of quality of int8 weights on two trained models: the demo's (with images) and SmolLM2-135M (text).

    make demo                                          # trains runs/tiny on data/easy_vqa
    python benchmarks/smollm2.py smollm2               # see there
    python benchmarks/int8_quality.py --demo-run runs/tiny --language-model smollm2

Against the same model in fp32, at every token of answers and of a text that are given to both:

    KL          of the distributions of the next token, fp32 || other, in nats
    same top    share of the tokens at which both find the same token most likely
    same answer share of questions to which both, greedy and each with its own cache, give the same tokens

bf16 (weights and computation) is the yardstick. "Only" forms have int8 in one part of the model, to find out where the
loss comes from; their matrices are rounded to int8 and multiplied by their scales, and the computation is in fp32.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

import phivision_jax
from benchmarks.tables import fill, markdown
from phivision_jax.batch import Batch
from phivision_jax.data.store.dataset import Dataset
from phivision_jax.evaluation.scoring import exact_match
from phivision_jax.inference.local import LocalGenerator
from phivision_jax.inference.requests import Request
from phivision_jax.models import phivision
from phivision_jax.models.phivision import Params, PhiVision
from phivision_jax.processor import Processor
from phivision_jax.rows import batch_from_ids

ROOT = Path(__file__).parents[1]
RESULT, PAGE = ROOT / "docs/results/int8_quality.json", ROOT / "docs/generation.md"
MATRIX = re.compile("kernel$|embedding$")
PARTS = {
    "decoder layers": "^decoder/layers/",
    "embeddings and head": "^decoder/(embed_tokens|lm_head)/",
    "vision and projector": "^(vision|projector)/",
}
QUESTIONS = (
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "Write a short poem about the sea.",
    "How do I boil an egg?",
    "What is 12 + 7?",
    "Name three animals that live in the desert.",
    "Translate 'good morning' to Spanish.",
    "Who wrote Romeo and Juliet?",
    "Give me a recipe for pancakes.",
    "What causes the seasons on Earth?",
    "Write a Python function that reverses a string.",
    "What is the difference between a list and a tuple in Python?",
    "Summarise the story of Cinderella in three sentences.",
    "Why do cats purr?",
    "List the planets of the solar system.",
    "What should I pack for a weekend in the mountains?",
    "Explain photosynthesis to a child.",
    "Write an email that asks for a day off.",
    "What is machine learning?",
    "Suggest a name for a small bakery and explain it.",
    "How does a bicycle stay upright?",
    "What are the benefits of regular exercise?",
    "Describe the colour red to someone who cannot see.",
    "What happened in 1969 that involved the Moon?",
)
ANSWER, WINDOW, ROWS = 96, 512, 4


def flat(params: Params) -> dict[str, jax.Array]:
    return {"/".join(path): leaf for path, leaf in nnx.traversals.flatten_mapping(params).items()}


def partly(exact: PhiVision, int8: PhiVision, pattern: str) -> PhiVision:
    """``exact`` with those matrices replaced by int8 times scale whose paths match."""
    (graphdef, params), narrow = exact.split(), flat(int8.split()[1])
    mixed = flat(params)
    for path in mixed:
        if narrow[path].dtype == jnp.int8 and re.search(pattern, path):
            scale = narrow[MATRIX.sub("scale", path)]
            contracted = range(scale.ndim, narrow[path].ndim)  # as many as the scale lacks
            first = 1 if "/layers/" in path else scale.ndim if path.startswith("decoder/") else 0
            mixed[path] = narrow[path] * jnp.expand_dims(scale, tuple(first + i for i, _ in enumerate(contracted)))
    tree = nnx.traversals.unflatten_mapping({tuple(path.split("/")): leaf for path, leaf in mixed.items()})
    return phivision.merge(graphdef, tree)


@functools.partial(jax.jit, static_argnums=0)
def log_probabilities(graphdef: nnx.GraphDef, params: Params, batch: Batch) -> jax.Array:
    return jax.nn.log_softmax(phivision.merge(graphdef, params)(batch))


class Differences:
    """KL and agreement at the tokens of batches with a weight."""

    def __init__(self, exact: PhiVision, batches: Sequence[Batch]) -> None:
        self.exact, self.batches = exact.split(), batches

    def __call__(self, other: PhiVision) -> dict[str, float]:
        kl, same = [], []
        for batch in self.batches:
            p, q = (log_probabilities(*model, batch) for model in (self.exact, other.split()))
            counted = np.asarray(batch.loss_weights) > 0
            kl.append(np.asarray((jnp.exp(p) * (p - q)).sum(-1))[counted])
            same.append(np.asarray(p.argmax(-1) == q.argmax(-1))[counted])
        values = np.concatenate(kl)
        return {
            "tokens": len(values),
            "kl_mean": float(values.mean()),
            "kl_median": float(np.median(values)),
            "kl_99": float(np.quantile(values, 0.99)),
            "same_top": float(np.concatenate(same).mean()),
        }


def forms(where: Path, parts: Sequence[str]) -> Iterator[tuple[str, PhiVision]]:
    """The forms of a model, with their names; fp32 is the first."""
    exact, narrow = (phivision_jax.load(where, weights=weights)[0] for weights in (None, "int8"))
    yield "fp32", exact
    yield "bf16", phivision_jax.load(where, dtype="bfloat16")[0]
    yield "int8, computed in fp32", narrow
    yield "int8, computed in bf16", phivision_jax.load(where, dtype="bfloat16", weights="int8")[0]
    for part in parts:
        yield f"int8 only in {part}", partly(exact, narrow, PARTS[part])


def answers(model: PhiVision, processor: Processor, prompts: Sequence[Any]) -> list[tuple[int, ...]]:
    """Greedy token ids."""
    generator = LocalGenerator(model, processor, slots=8, length=512)
    return [samples[0].ids for samples in generator.generate([Request(p, max_new_tokens=ANSWER) for p in prompts])]


def shared(ours: Sequence[tuple[int, ...]], theirs: Sequence[tuple[int, ...]]) -> dict[str, float]:
    equal = [a == b for a, b in zip(ours, theirs, strict=True)]
    return {"questions": len(equal), "same_answer": float(np.mean(equal))}


def weights_gb(model: PhiVision) -> float:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(model.split()[1])) / 1e9


def language(where: Path) -> dict[str, Any]:
    """SmolLM2: its own fp32 answers to questions, and the text of this project's README."""
    rows: dict[str, Differences] = {}
    found: dict[str, Any] = {}
    processor = phivision_jax.load(where)[1]
    for name, model in forms(where, list(PARTS)[:2]):
        alone = name.startswith("int8 only")
        ids = None if alone else answers(model, processor, QUESTIONS)
        if not rows and ids is not None:
            expected, config = ids, model.config
            prompts = [processor.encode([{"role": "user", "content": q}], generation_prompt=True) for q in QUESTIONS]
            texts = [[*p.tokens.tolist(), *answer] for p, answer in zip(prompts, ids, strict=True)]
            counts = [len(p.tokens) for p in prompts]
            readme = processor.tokenizer.encode((ROOT / "README.md").read_text())
            windows = [readme[i : i + WINDOW] for i in range(0, 8 * WINDOW, WINDOW)]
            rows = {
                "answers": Differences(model, list(batches(texts, counts, config))),
                "text": Differences(model, list(batches(windows, [1] * len(windows), config))),
            }
        found[name] = {kind: differences(model) for kind, differences in rows.items()}
        found[name] |= {"weights_gb": weights_gb(model)} | ({} if ids is None else shared(ids, expected))
        print(name, found[name], flush=True)
    return found


def batches(texts: Sequence[list[int]], given: Sequence[int], config: Any) -> Iterator[Batch]:
    """Rows of one length; the tokens that follow the first ``given`` of each text count."""
    length = max(map(len, texts))
    for i in range(0, len(texts), ROWS):
        batch = batch_from_ids(texts[i : i + ROWS], config=config, length=length)
        weights = np.zeros(batch.tokens.shape, np.float32)
        for row, text, count in zip(weights, texts[i : i + ROWS], given[i : i + ROWS], strict=True):
            row[count - 1 : len(text) - 1] = 1
        yield batch._replace(loss_weights=weights)


def demo(run: Path, data: Path, examples: int) -> dict[str, Any]:
    """The demo's model: the answers of test records."""
    dataset, processor = Dataset.open(data), phivision_jax.load(run)[1]
    records = [dataset[int(i)] for i in np.linspace(0, len(dataset), examples, endpoint=False)]
    groups = [records[i : i + 50] for i in range(0, len(records), 50)]
    given = [
        processor.batch([r.messages for r in group], [r.images for r in group], generation_prompt=False, multiple=32)
        for group in groups
    ]
    prompts = [processor.encode(r.messages[:-1], r.images, generation_prompt=True) for r in records]
    differences: Differences | None = None
    expected: list[tuple[int, ...]] = []
    found: dict[str, Any] = {}
    for name, model in forms(run, list(PARTS)):
        differences = differences or Differences(model, given)
        ids = answers(model, processor, prompts)
        expected = expected or ids
        correct = [
            exact_match(processor.decode(i), r.messages[-1]["content"]) for i, r in zip(ids, records, strict=True)
        ]
        found[name] = {"answers": differences(model), "weights_gb": weights_gb(model), **shared(ids, expected)}
        found[name]["accuracy"] = float(np.mean(correct))
        print(name, found[name], flush=True)
    return found


def table(results: Mapping[str, Any]) -> str:
    """The table of the documentation: at the tokens of answers."""
    rows = []
    for title, forms in results.items():
        for name, found in forms.items():
            one = found["answers"]
            numbers = f"{one['kl_mean']:.1e}", f"{one['kl_99']:.1e}", f"{one['same_top']:.1%}"
            answer = f"{found['same_answer']:.0%} of {found['questions']}" if "same_answer" in found else ""
            if name != "fp32":
                rows.append((f"{title}, {one['tokens']:,} tokens", name, *numbers, answer))
    return markdown(("", "weights", "mean KL", "99 % below", "same top", "same answer"), rows)


def main(
    demo_run: Path | None = None,
    data: Path = Path("data/easy_vqa/test"),
    language_model: Path | None = None,
    examples: int = 500,
) -> None:
    """Measure the models that are given, and write the result and the table of the documentation.

    Args:
        demo_run: The demo's run.
        data: Its test set.
        language_model: Directory that benchmarks/smollm2.py wrote.
        examples: Records of the test set to answer.
    """
    results = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    if demo_run is not None:
        results["demo"] = demo(demo_run, data, examples)
    if language_model is not None:
        results["SmolLM2-135M"] = language(language_model)
    RESULT.write_text(json.dumps(results, indent=2) + "\n")
    PAGE.write_text(fill(PAGE.read_text(), "int8", table(results)))


if __name__ == "__main__":
    tyro.cli(main)
