"""Replies and records, from a seed: sentences as models write them, and soups of what rules look for."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

from phrases import (
    BOXES,
    CHOICE_PIECES,
    CHOICE_SENTENCES,
    CLICKS,
    LETTERS,
    MATH_ANSWERS,
    MATH_PIECES,
    MATH_SENTENCES,
    NUMBERS,
    OPEN_PIECES,
    OPEN_SENTENCES,
    OPTIONS,
    POINT_PIECES,
    POINTS,
    WORDS,
    YES_NO,
    YES_NO_PIECES,
)


def sentences(text: str) -> list[str]:
    return [each for line in text.strip().split("\n") for each in line.replace("\\n", "\n").split("|") if each]


def soup(rng: random.Random, pieces: list[str], longest: int = 14) -> str:
    return "".join(rng.choices(pieces, k=rng.randint(0, longest)))


def choice_reply(rng: random.Random, options: list[str]) -> str:
    if rng.random() < 0.35:
        between = rng.choice(("", " "))
        return between.join(rng.choices(CHOICE_PIECES, k=rng.randint(1, 12)))
    letters = [chr(65 + index) for index in range(len(options))]
    one, other = rng.choice(letters), rng.choice(letters)
    text = rng.choice(options if rng.random() < 0.8 else WORDS)
    sentence = rng.choice(sentences(CHOICE_SENTENCES))
    return sentence.format(L=one, l=one.lower(), M=other, T=text)


def open_reply(rng: random.Random, answer: str) -> str:
    if rng.random() < 0.35:
        return soup(rng, [*OPEN_PIECES, answer])
    values = [answer if rng.random() < 0.6 else rng.choice([*NUMBERS, *WORDS]) for _ in range(2)]
    sentence = rng.choice(sentences(OPEN_SENTENCES))
    return sentence.format(
        N=values[0], O=values[1], T=rng.choice([answer, *WORDS]), U=rng.choice(["cm", "m", "%", "apples"])
    )


def number_reply(rng: random.Random, answer: str) -> str:
    if rng.random() < 0.5:
        return open_reply(rng, answer)
    forms = (
        "{}",
        " {} ",
        "{}.0",
        "{}%",
        "{}.",
        "+{}",
        "{}e0",
        "{}0",
        "0{}",
        "{}.00001",
        "${}",
        "{} cm",
        "{}\n",
        "-{}",
        "{:.4}",
    )
    try:
        number = float(answer)
    except ValueError:
        return rng.choice((answer, answer.upper(), answer.lower(), f" {answer}", f"{answer}.", f"The {answer}"))
    near = number * rng.choice((1, 1, 0.95, 1.05, 0.949, 1.051, 1.02, 100, 0.01, -1, 2))
    return rng.choice(forms).format(answer if rng.random() < 0.4 else f"{near:.6g}")


def reply(rng: random.Random, templates: str, pieces: list[str], **values: str) -> str:
    return soup(rng, pieces) if rng.random() < 0.3 else rng.choice(sentences(templates)).format(**values)


def with_thought(rng: random.Random, text: str) -> str:
    return rng.choice(["<think>A 1 yes [0.1, 0.1]</think>", "</think>", "<analysis>\nB</analysis>\n"]) + text


def coordinates(rng: random.Random) -> dict[str, str]:
    x, y = sorted(rng.uniform(0, 1) for _ in range(2)), sorted(rng.uniform(0, 1) for _ in range(2))
    digits = rng.choice((2, 3, 4))
    named = dict(zip("xyvw", (x[0], y[0], x[1], y[1]), strict=True))
    pixels = {"p": f"{x[0] * 100:.0f}", "q": "50", "s": f"{x[0] * 1000:.0f}", "t": f"{y[0] * 1000:.0f}"}
    return {name: f"{value:.{digits}f}" for name, value in named.items()} | pixels


Case = tuple[str, dict[str, Any]]


def cases(rule: str, seed: int) -> Iterator[Case]:
    """Endless (prediction, record) of a rule."""
    rng = random.Random(f"{rule} {seed}")
    while True:
        prediction, record = MAKERS[rule](rng)
        yield (with_thought(rng, prediction) if rng.random() < 0.05 else prediction), record


def _letters(rng: random.Random) -> Case:
    prediction = choice_reply(rng, rng.choice([each for each in OPTIONS if len(each) == 4]))
    return prediction, {"answer": rng.choice([each for each in LETTERS if each in prediction] or LETTERS)}


def _mcq(rng: random.Random) -> Case:
    options = rng.choice(OPTIONS)
    letters = [chr(65 + index) for index in range(len(options))]
    return choice_reply(rng, options), {
        "options": dict(zip(letters, options, strict=True)),
        "answer": rng.choice(letters),
    }


def _mmmu_mc(rng: random.Random) -> Case:
    prediction, record = _mcq(rng)
    return prediction, {**record, "options": list(record["options"].values())}


def _open(rng: random.Random) -> Case:
    answers = rng.sample([*NUMBERS, *WORDS, "a", "Two Lines"], rng.choice((1, 1, 1, 2)))
    return open_reply(rng, answers[0]), {"answer": answers if len(answers) > 1 else answers[0]}


def _chartqa(rng: random.Random) -> Case:
    answers = rng.sample([*NUMBERS, "50%", "5 %", "Red", "United States", "nan", "inf"], rng.choice((1, 1, 2)))
    return number_reply(rng, answers[0]), {"answer": answers if len(answers) > 1 else answers[0]}


def _mathvista(rng: random.Random) -> Case:
    kind = rng.choice(("multi_choice", "integer", "float", "list"))
    record = {"question_type": "free_form", "answer_type": kind, "choices": None, "precision": None}
    if kind == "multi_choice":
        options = rng.choice(OPTIONS)
        index = rng.randrange(len(options))
        record |= {"question_type": kind, "answer_type": "text", "choices": options, "answer": options[index]}
        return choice_reply(rng, options), {**record, "answer_option": chr(65 + index)}
    if kind == "list":
        answer = rng.choice(("[2007, 2008]", "[1.2, 3]"))
        return rng.choice((answer, "[2007,2008]", f" {answer}", f"{answer}.")), {**record, "answer": answer}
    answer = rng.choice(
        ("0", "1", "14", "-3", "2008") if kind == "integer" else ("0.6", "1.45", "3.0", "-0.50", "12.3")
    )
    precision = float(len(answer.partition(".")[2])) if kind == "float" else None
    return number_reply(rng, answer), {**record, "precision": precision, "answer": answer}


def _prefetch(rng: random.Random) -> Case:
    prediction, record = _mathvista(rng)
    return prediction, {"answer_option": None, **{key: record[key] for key in record if key != "precision"}}


def _yes_no(rng: random.Random) -> Case:
    return reply(rng, YES_NO, YES_NO_PIECES), {"answer": rng.choice(("Yes", "No"))}


def _math(rng: random.Random) -> Case:
    if rng.random() < 0.25:
        options = rng.sample(MATH_ANSWERS, 5)
        letter = rng.choice("ABCDE")
        record = {"answer": letter, "options": options}
        gold = rng.choice((letter, options[ord(letter) - 65]))
        if rng.random() < 0.4:
            return choice_reply(rng, options), record
    else:
        gold = rng.choice(MATH_ANSWERS)
        record = {"answer": gold, "options": []}
    values = [gold if rng.random() < 0.7 else rng.choice(MATH_ANSWERS) for _ in range(2)]
    return reply(rng, MATH_SENTENCES, [*MATH_PIECES, gold], N=values[0], O=values[1]), record


def _screenshot(templates: str) -> Callable[[random.Random], Case]:
    def make(rng: random.Random) -> Case:
        values = coordinates(rng)
        box = [
            round(max(0.0, float(values["x"]) - rng.uniform(-0.05, 0.3)), 4),
            0.0,
            round(rng.uniform(0.5, 1), 4),
            1.0,
        ]
        if rng.random() < 0.5:
            box = [float(values["x"]), float(values["y"]), 1.0, min(1.0, round(float(values["w"]) + 0.01, 4))]
        return reply(rng, templates, POINT_PIECES, **values), {"bbox_xyxy_norm": box, "image_size": [1920, 1080]}

    return make


def _click(rng: random.Random) -> Case:
    width, height = rng.choice(((1920, 1080), (640, 480), (1179, 2556)))
    left, top, wide, high = (
        rng.randrange(width - 99),
        rng.randrange(height - 99),
        rng.randint(1, 98),
        rng.randint(1, 98),
    )
    if rng.random() < 0.1:
        left, top, wide, high = 0, 0, width // 2, height // 2
    x, y = (
        left + rng.choice((-1, 0, 1, wide - 1, wide, wide // 2)),
        top + rng.choice((-1, 0, high - 1, high, high // 2)),
    )
    values = {**coordinates(rng), "x": str(max(x, 0)), "y": str(max(y, 0))}
    templates = CLICKS if rng.random() < 0.7 else POINTS
    return reply(rng, templates, POINT_PIECES, **values), {
        "bbox_xywh_px": [left, top, wide, high],
        "image_size": [width, height],
    }


def _ocr(rng: random.Random) -> Case:
    formula = rng.random() < 0.3
    gold = ["x ^ { 2 }", "\\frac { a } { b }"] if formula else ["Hello World", "12:30", "é", "CENTRE"]
    answers = rng.sample(gold, rng.randint(1, 2))
    text = rng.choice(
        [*answers, "Hello\nWorld", "hello  world", "x^{2}", "X^{2}", "\\frac{a}{b}", "It is 12:30 now", "centr"]
    )
    text = (
        soup(rng, ["Hello", "World", " ", "\n", "12", ":", "30", "é", *"xXab{}^2", "\\frac", text], 8)
        if rng.random() < 0.3
        else text
    )
    text = rng.choice(
        (text, text.lower(), text.upper(), f'The text is "{text}".', f"<think>{text}</think>no", f" {text} ")
    )
    kind = "Handwritten Mathematical Expression Recognition" if formula else "Scene Text-centric VQA"
    return text, {"answers": answers, "dataset": "HME100k" if formula else "TextVQA", "question_type": kind}


def _braces(rng: random.Random) -> Case:
    answer = rng.choice(("42", "3.5", "blue", "A, B"))
    pieces = ["{", "}", "{}", answer, answer.upper(), " ", "\n", "7", "final answer", "\\boxed{", "}}", "</think>"]
    sentence = rng.choice(
        ("The answer is {{{N}}}.", "{N}", "{{{N}", "{{1}} then {{{N}}}", "{{{N}}} or {{1}}", "\\boxed{{{N}}}")
    )
    return soup(rng, pieces) if rng.random() < 0.5 else sentence.format(N=rng.choice((answer, "7"))), {"answer": answer}


def _thoughts(rng: random.Random) -> Case:
    tags = ["<think>", "</think>", "<analysis>", "</analysis>", "<th", "ink>", "</th", "a", "B", " ", "\n", "<THINK>"]
    return soup(rng, tags, 12), {}


MAKERS: dict[str, Callable[[random.Random], Case]] = {
    "ai2d_lmms": _letters,
    "chartqa_relaxed": _chartqa,
    "hallusion_yesno": _yes_no,
    "mathvision_equal": _math,
    "mathvista_normalize": _mathvista,
    "mathvista_prefetch": _prefetch,
    "mcq": _mcq,
    "mmmu_mc": _mmmu_mc,
    "mmmu_open": _open,
    "mmstar_lmms": _letters,
    "ocrbench": _ocr,
    "screenspot_bbox": _screenshot(BOXES),
    "screenspot_pixel_click": _click,
    "screenspot_point": _screenshot(POINTS),
    "think_strip": _thoughts,
    "vstar_lmms": _letters,
    "wemath_letter": _letters,
    "zerobench_braces": _braces,
}
