"""Directories of evaluations with generated rows, as the runner writes them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image, ImageDraw

from phivision_jax.evaluation.benchmark import Benchmark, Item, Published, Scored
from phivision_jax.evaluation.results import Result
from phivision_jax.evaluation.scoring import Score
from tests.support.bombs import encoded

HOSTILE = (
    "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=1'> \u202eright to left\u202c שלום"
)
"""Text that must stay text."""
MODES = ("auto", "think", "nothink")


class Charts(Benchmark):
    """A benchmark whose score is a mean."""

    name = "chartqa"
    title = "ChartQA"
    published: ClassVar[Published | None] = Published(83.3, "Microsoft Research's article", "smaller images")

    def items(self, path: str) -> Sequence[Item]:
        raise NotImplementedError

    def score(self, prediction: str, item: Item) -> Score:
        raise NotImplementedError


class Screens(Charts):
    """A benchmark of boxes without a published figure."""

    name = "screenspot_v2"
    title = "ScreenSpot-v2"
    published: ClassVar[Published | None] = None


class Pairs(Charts):
    """A benchmark whose score is the share of clusters that are all correct, and is published with a judge."""

    name = "hallusion"
    title = "HallusionBench"
    published: ClassVar[Published | None] = Published(64.4, "README")
    judged: ClassVar = True

    def summary(self, scored: Sequence[Scored]) -> dict[str, float]:
        figures: dict[str, list[float]] = {}
        for each in scored:
            figures.setdefault(each.item.cluster, []).append(each.score.value)
        each_figure = [min(values) for values in figures.values()]
        return {
            "score": 100 * float(np.mean(each_figure)),
            "aAcc": 100 * float(np.mean([s.score.value for s in scored])),
        }


BENCHMARKS = {kind.name: kind() for kind in (Charts, Screens, Pairs)}


def row(**changes: Any) -> Result:
    """A row with a correct answer, with changes."""
    fields: dict[str, Any] = {
        "benchmark": "chartqa", "item": "1", "mode": "nothink", "taken": "nothink", "fingerprint": "f",
        "question": "How many?", "images": (), "record": {"answer": "4"}, "groups": {}, "cluster": "", "thought": "",
        "answer": "4", "finish_reason": "stop", "error": "", "value": 1.0, "extracted": "4", "reason": "equal",
        "judge": "", "prompt_tokens": 300, "image_tokens": 280, "thought_tokens": 0, "answer_tokens": 4, "queue": 0.01,
        "prefill": 0.1, "decode": 0.2,
    }  # fmt: skip
    return Result(**fields | changes)


def write_run(directory: Path, rows: Sequence[Result], **settings: Any) -> Path:
    """Write rows as an evaluation in two shards."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "run.json").write_text(json.dumps({"about": {"model": "phi-4-rv"}} | settings))
    for shard in range(2):
        lines = [json.dumps(dataclasses.asdict(each)) + "\n" for each in rows[shard::2]]
        (directory / f"results-{shard}.jsonl").write_text("".join(lines))
    return directory


def screen(directory: Path, seed: int) -> tuple[str, tuple[float, float, float, float]]:
    """Write an image of a window with a button; its file name, and the button's box relative to 1."""
    random = np.random.default_rng(seed)
    image = Image.new("RGB", (640, 400), "#dfe6ee")
    canvas = ImageDraw.Draw(image)
    canvas.rectangle([0, 0, 640, 28], "#34495e")
    left, top = int(random.integers(20, 480)), int(random.integers(60, 330))
    canvas.rectangle([left, top, left + 130, top + 40], "#2980b9")
    canvas.text((left + 40, top + 12), f"Button {seed}", "white")
    png = encoded(image, "PNG")
    name = f"{hashlib.sha256(png).hexdigest()}.png"
    (directory / "images").mkdir(parents=True, exist_ok=True)
    (directory / "images" / name).write_bytes(png)
    return name, (left / 640, top / 400, (left + 130) / 640, (top + 40) / 400)


GAINS = {"chartqa": 0.8, "screenspot_v2": -0.6, "hallusion": 0.0}
"""Change of the log-odds of a correct answer by thinking."""


def sample_rows(directory: Path, items: int, seed: int = 0, skill: float = 0.0, images: int = 6) -> list[Result]:
    """Rows of ``items`` items in three benchmarks and three modes, with images in ``directory``.

    Two items share an image. The probability of a correct answer depends on the item, the mode and ``skill``. Some
    replies fail or are cut off, the same ones for every seed; item 1 has hostile texts.
    """
    screens = [screen(directory, i) for i in range(images)]
    fixed, random = np.random.default_rng(99), np.random.default_rng(seed)
    rows = []
    for i in range(items):
        benchmark, ease = list(BENCHMARKS)[i * 3 // items], fixed.normal(0.9, 1.0)
        for mode in MODES:
            prefers_thinking = (benchmark != "screenspot_v2") ^ (fixed.random() < 0.3)
            taken = mode if mode != "auto" else "think" if prefers_thinking else "nothink"
            odds = ease + skill + GAINS[benchmark] * (taken == "think")
            correct, tokens = (
                random.random() < 1 / (1 + np.exp(-odds)),
                int(random.lognormal(6.2 - 0.3 * ease, 0.8)) + 1,
            )
            tokens *= taken == "think"
            name, box = screens[i // 2 % images]
            fields = _screen_texts(i // 2 % images, box, correct) if "screen" in benchmark else _chart_texts(i, correct)
            fields |= {
                "benchmark": benchmark, "item": f"{benchmark}-{i}", "mode": mode, "taken": taken, "images": (name,),
                "cluster": f"image {i // 2}", "value": float(correct), "thought_tokens": tokens, "answer_tokens": 20,
                "thought": "I look at the image and count. " * (tokens // 8), "decode": 0.02 * (tokens + 20),
                "groups": {"split": "human" if i % 2 else "augmented"},
                "judge": "gpt-4o-mini" if benchmark == "hallusion" and i % 5 == 0 else "",
            }  # fmt: skip
            fields |= _trouble(fixed.random())
            if i == 1:
                fields |= {"question": f"Question {HOSTILE}", "answer": f"Answer {HOSTILE}", "thought": HOSTILE}
                fields |= {"value": 0.0, "item": f"1/{HOSTILE}"}
            rows.append(row(**fields))
    return rows


def _chart_texts(i: int, correct: bool) -> dict[str, Any]:
    answer = ("4", "4", "equal") if correct else ("There are 7 bars.", "7", "other number")
    texts = dict(zip(("answer", "extracted", "reason"), answer, strict=True))
    return {"question": f"<image>\nHow many bars does chart {i} have?", "record": {"answer": "4"}, **texts}


def _screen_texts(button: int, box: Sequence[float], correct: bool) -> dict[str, Any]:
    seen = [round(min(value + 0.2 * (not correct), 1.0), 3) for value in box]
    return {
        "question": f"<image>\nWhere is button {button}? Answer with its box, relative to 1.",
        "answer": f"the button: {seen}",
        "extracted": seen,
        "record": {"bbox_xyxy_norm": list(box)},
        "reason": "centre inside" if correct else "centre outside",
    }


def _trouble(state: float) -> dict[str, Any]:
    """Fields of a request that failed (1 %), of a reply that was cut off (2 %), or of neither."""
    empty = {"value": 0.0, "answer": "", "extracted": None}
    if state < 0.01:
        error = {"finish_reason": "error", "error": "the endpoint does not answer", "taken": None, "reason": ""}
        return {**empty, **error, "thought": "", "thought_tokens": 0, "answer_tokens": 0, "prefill": 0.0, "decode": 0.0}
    return {**empty, "finish_reason": "length", "reason": "unparsed"} if state < 0.03 else {}
