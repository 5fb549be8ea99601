"""A benchmark of sums, from a JSON file with a list of [a, b, seed of an image]; every fourth asks a judge."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from phivision_jax.evaluation.benchmark import Benchmark, Item, Published
from phivision_jax.evaluation.scoring import Score


@functools.cache
def image(seed: int) -> bytes:
    """A PNG of noise; a negative seed gives a file that cannot be decoded."""
    file = io.BytesIO()
    pixels = np.random.default_rng(abs(seed)).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()[:80] if seed < 0 else file.getvalue()


class Sums(Benchmark):
    name, title, judged = "sums", "Sums", True
    published = Published(99.0, "arithmetic")
    max_new_tokens = 8

    def items(self, path: str) -> Sequence[Item]:
        rows = json.loads(Path(path).read_text())
        return [
            Item(str(i), f"{a} + {b}?", (image(seed),), {"answer": str(a + b)}, {"parity": "odd" if i % 2 else "even"})
            for i, (a, b, seed) in enumerate(rows)
        ]

    def score(self, prediction: str, item: Item) -> Score:
        correct = prediction.strip() == item.record["answer"]
        return Score(float(correct), prediction, "equal" if correct else "different")

    def judge_prompt(self, prediction: str, item: Item) -> str | None:
        return f"Is {prediction} right for {item.question}" if int(item.id) % 4 == 0 else None

    def judge_score(self, judge_reply: str, item: Item) -> Score:
        return Score(float(judge_reply == "yes"), judge_reply, "judged")


def write_sums(path: Path, count: int) -> list[list[int]]:
    """Write a file of sums, four on each image; returns its rows."""
    rows = [[i, 2 * i, i // 4] for i in range(count)]
    path.write_text(json.dumps(rows))
    return rows
