"""Replies that are made to break or to slow down a parser, from a seed."""

from __future__ import annotations

import random
from typing import Any

LARGE = 1_000_000
"""Characters of the largest replies."""
TOKENS = [
    *"ABCDEabcdZ01239 \n\t.,:;!?'\"()[]{}<>=+-*/\\^_%$@#&|~`",
    *("<think>", "</think>", "<analysis>", "</analysis>", "<think", "<bbox>", "<bbox", "</bbox>"),
    *("< / bbox >", "oxed{"),
    *("\\boxed{", "\\frac", "\\sqrt", "{}", "{{", "}}", "((", "))", "^{", "**9", "9**9**9", "9^{9^{9}}"),
    *("9!!", "1e999"),
    *("answer is ", "the answer is ", "Answer", "option ", "is ", "so ", "could be ", "yes", "no", "x=1"),
    *("y=2", "x=", ", y="),
    *("1,000", ",000", "1.5", "-.5", "1e5", "nan", "inf", "-inf", "Infinity", "1_000", "٣", "²", "½"),
    *("100000000000000000000",),
    *("click(x=", "click(x=1, y=", "(A)", "(a) ", " A ", "A.", "[0.1, 0.2]", "[0.1, 0.2, 0.3, 0.4]", "[1 ", "50%"),
    *("\0", "\x07", "\x1b[31m", "\x85", "\u2028", "\ufeff", "\ud800", "\u202e", "\u200f", "שלום"),
    *("مرحبا", "İ", "ß", "ſ", "e\u0301"),
    *("中文", "정답은", "选", "🙂", "\U0010ffff", "\\", "\\text{", "\\left(", "\\approx", "\\cdot", "\\pi"),
    *("'''", "%s", "{0}"),
    *("__import__('os').system('x')", "lambda: 0", "1/0", "[]*9", "int('9'*9999)"),
]  # fmt: skip


def reply(rng: random.Random, large: bool) -> str:
    """A reply of some tokens; a large one repeats a few of them."""
    if large:
        unit = "".join(rng.choices(TOKENS, k=rng.choice((1, 1, 2, 3))))
        start, end = ("".join(rng.choices(TOKENS, k=rng.randint(0, 3))) for _ in range(2))
        return start + unit * (LARGE // len(unit)) + end
    kind = rng.random()
    if kind < 0.1:
        return rng.choice(TOKENS) * rng.randint(1, 400)
    if kind < 0.2:
        return "".join(chr(rng.choice((rng.randrange(128), rng.randrange(0x3000)))) for _ in range(rng.randint(0, 40)))
    if kind < 0.3:
        depth = rng.randint(1, 300)
        one, other = rng.choice(PAIRS)
        return one * depth + rng.choice(TOKENS) + other * rng.choice((depth, depth - 1))
    return "".join(rng.choices(TOKENS, k=rng.randint(0, 20)))


PAIRS = [("{", "}"), ("(", ")"), ("[", "]"), ("\\boxed{", "}"), ("\\frac{", "}{2}"), ("\\sqrt{", "}"), ("2^{", "}")]
OPTIONS = ["red", "(B)", "12 cm", "\\frac{1}{2}"]
_NUMBER = {"question_type": "free_form", "choices": None, "precision": 2.0, "answer": "3.5"}
_CHOICE = {"question_type": "multi_choice", "answer_type": "text", "choices": OPTIONS, "precision": 2.0}
_BOX = {"bbox_xyxy_norm": [0.1, 0.1, 0.5, 0.5], "image_size": [1920, 1080]}
_OCR = {"answers": ["yes no", "X"], "question_type": "Doc-oriented VQA"}
RECORDS: dict[str, list[dict[str, Any]]] = {
    "ai2d_lmms": [{"answer": "A"}],
    "chartqa_relaxed": [{"answer": ["3.5", "0", "50%", "red"]}, {"answer": "1e999"}],
    "hallusion_yesno": [{"answer": "Yes"}],
    "mathvision_equal": [
        *({"answer": answer, "options": []} for answer in ("\\frac{\\sqrt{3}}{2}", "9", "(1,2)", "x+1")),
        {"answer": "D", "options": OPTIONS},
    ],
    "mathvista_normalize": [
        {**_CHOICE, "answer": "red"},
        *({**_NUMBER, "answer_type": k} for k in ("integer", "float", "list")),
    ],
    "mathvista_prefetch": [{**_CHOICE, "answer": "red", "answer_option": "A"}, _NUMBER],
    "mcq": [{"options": dict(zip("ABCD", OPTIONS, strict=True)), "answer": "A"}],
    "mmmu_mc": [{"options": OPTIONS, "answer": "A"}],
    "mmmu_open": [{"answer": ["1.5", "a"]}, {"answer": "inf"}],
    "mmstar_lmms": [{"answer": "A"}],
    "ocrbench": [{**_OCR, "dataset": name} for name in ("TextVQA", "HME100k")],
    "screenspot_bbox": [_BOX],
    "screenspot_pixel_click": [{"bbox_xywh_px": [0, 0, 9, 9], "image_size": [1920, 1080]}],
    "screenspot_point": [_BOX, {**_BOX, "coordinates": "pixels"}],
    "vstar_lmms": [{"answer": "A"}],
    "wemath_letter": [{"answer": "A"}],
    "zerobench_braces": [{"answer": "42"}],
}
"""Records of each rule."""
