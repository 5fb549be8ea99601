"""Small sets of the benchmarks with one image and a short answer; see ``benchmark_sets``."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from tests.support import benchmark_sets as sets
from tests.support.benchmark_sets import (
    COLOURS,
    COUNT,
    IMAGE,
    LETTER,
    LETTERS,
    OPTIONS,
    PLAIN,
    SELECT,
    Written,
    beside,
    choices,
    image,
    parquet,
    question,
    save,
    table,
    tsv,
)

MCQ_PROMPT = f"Question: {PLAIN}\nOptions:\n{OPTIONS}{SELECT}"
BOXED = 'Please solve the problem step by step and put your answer in one "\\boxed{}".'


def vstar_jsonl(folder: Path) -> Written:
    inline = "\n".join(f"({letter}) {colour}" for letter, colour in zip(LETTERS, COLOURS, strict=True))
    lines = []
    for k in range(COUNT):
        category = ("direct_attributes", "relative_position")[k % 2]
        text = f"{question(k)}\n{inline}\nAnswer with the option's letter from the given choices directly."
        row = {"image": save(folder, f"{category}/{k}.jpg", k), "text": text, "category": category}
        lines.append(json.dumps({**row, "label": LETTER[k], "question_id": str(k)}))
    (folder / "test_questions.jsonl").write_text("\n".join(lines) + "\n")
    return Written(folder, LETTER, MCQ_PROMPT)


def vstar_lmms(folder: Path) -> Written:
    inline = " ".join(f"({letter}) {colour}" for letter, colour in zip(LETTERS, COLOURS, strict=True))
    rows = [
        {"image": image(k), "text": f"{question(k)} {inline}", "label": LETTER[k], "category": "direct_attributes"}
        | {"question_id": str(k)}
        for k in range(COUNT)
    ]
    parquet(folder / "data/test-00000-of-00001.parquet", rows)
    return Written(folder, LETTER, MCQ_PROMPT)


def vstar_tsv(folder: Path) -> Written:
    tsv(folder / "VStarBench.tsv", [table(k, question=question(k), category="x", **choices(k)) for k in range(COUNT)])
    return Written(folder, LETTER, MCQ_PROMPT)


def ai2d_hub(folder: Path) -> Written:
    rows = [
        {"question": question(k), "options": COLOURS, "answer": str(k % 4), "image": image(k)} for k in range(COUNT)
    ]
    parquet(folder / "data/test-00000-of-00002.parquet", rows[:3])
    parquet(folder / "data/test-00001-of-00002.parquet", rows[3:])
    return Written(folder, LETTER, MCQ_PROMPT)


def ai2d_tsv(folder: Path) -> Written:
    tsv(folder / "AI2D_TEST.tsv", [table(k, question=question(k), **choices(k)) for k in range(COUNT)])
    return Written(folder / "AI2D_TEST.tsv", LETTER, MCQ_PROMPT)


def _mmstar(k: int) -> dict[str, Any]:
    return {"category": ("math", "logical reasoning")[k > 1], "l2_category": ("geometry", "code")[k > 1]}


def mmstar_hub(folder: Path) -> Written:
    inline = ", ".join(f"{letter}: {colour}" for letter, colour in zip(LETTERS, COLOURS, strict=True))
    rows = [
        {"index": k, "question": f"{question(k)}\nOptions: {inline}", "image": png_bytes(k), "answer": LETTER[k]}
        | {**_mmstar(k), "meta_info": {"source": "MMMU", "split": "val", "image_path": "x.jpg"}}
        for k in range(COUNT)
    ]
    types = {"meta_info": pa.struct({"source": pa.string(), "split": pa.string(), "image_path": pa.string()})}
    parquet(folder / "mmstar.parquet", rows, image=pa.binary(), **types)
    prompt = f"{PLAIN}\nOptions: {inline}\nAnswer with the option's letter from the given choices directly."
    return Written(folder / "mmstar.parquet", LETTER, prompt)


def png_bytes(seed: int) -> bytes:
    """An encoded image, as a column of bytes has it."""
    return image(seed)["bytes"]


def mmstar_tsv(folder: Path) -> Written:
    tsv(folder / "MMStar.tsv", [table(k, question=question(k), **choices(k), **_mmstar(k)) for k in range(COUNT)])
    return Written(folder, LETTER, MCQ_PROMPT)


def hallusionbench_hub(folder: Path) -> Written:
    rows = [
        {"category": "VD", "subcategory": "illusion", "visual_input": "1", "set_id": "0", "figure_id": str(k % 2)}
        | {"sample_note": "s", "question_id": str(k // 2), "question": question(k), "gt_answer": str(k % 2)}
        | {"gt_answer_details": "d", "filename": f"./hallusion_bench/VD/illusion/{k}.png", "image": image(k)}
        for k in range(COUNT)
    ]
    parquet(folder / "data/image-00000-of-00001.parquet", rows)
    without = [{**row, "image": None, "filename": None} for row in rows]
    parquet(folder / "data/non_image-00000-of-00001.parquet", without, image=IMAGE)
    return Written(folder, ["No.", "Yes."] * 3, PLAIN)


def hallusionbench_tsv(folder: Path) -> Written:
    rows = []
    for k in range(COUNT):
        row = table(
            k, question=question(k), answer=("No", "Yes")[k % 2], category="VD", **{"l2-category": "VD_illusion"}
        )
        if k % 2:
            row["image"] = sets.encoded(k)
        rows.append({**row, "index": f"hallusion_VD_illusion_0_{k % 2}_{k // 2}"})
    tsv(folder / "HallusionBench.tsv", [*rows, {**rows[0], "index": "hallusion_VS_map_0_0_9", "image": None}])
    return Written(folder, ["No.", "Yes."] * 3, PLAIN)


def _mathverse(k: int) -> tuple[dict[str, Any], str]:
    many = k % 2 == 0
    text = f"{question(k)}\nChoices:\nA:1\nB:2\nC:3\nD:4" if many else question(k)
    fields = {
        "sample_index": str(k + 1), "problem_index": str(k // 3),
        "problem_version": ("Text Lite", "Vision Only")[k % 2], "question": text, "answer": "B" if many else "12",
        "question_type": "multi-choice" if many else "free-form",
        "query_wo": "w", "query_cot": "c", "question_for_eval": text,
    }  # fmt: skip
    return fields, "B" if many else "12"


def mathverse_hub(folder: Path) -> Written:
    metadata = {"split": "testmini", "source": "GeoQA", "subject": "Plane Geometry", "subfield": "Angle"}
    rows = [{**_mathverse(k)[0], "image": image(k), "metadata": metadata} for k in range(COUNT)]
    types = {"metadata": pa.struct(dict.fromkeys(metadata, pa.string()))}
    parquet(folder / "testmini.parquet", rows, **types)
    texts = [{**row, "problem_version": "Text Only", "image": None} for row in rows]
    parquet(folder / "testmini_text_only.parquet", texts, image=IMAGE, **types)
    return Written(folder, [_mathverse(k)[1] for k in range(COUNT)], f"{PLAIN}\nChoices:\nA:1\nB:2\nC:3\nD:4")


def mathverse_tsv(folder: Path) -> Written:
    rows = [table(k, **_mathverse(k)[0], metadata="{'split': 'testmini'}") for k in range(COUNT)]
    tsv(folder / "MathVerse_MINI.tsv", rows)
    return Written(folder, [_mathverse(k)[1] for k in range(COUNT)], f"{PLAIN}\nChoices:\nA:1\nB:2\nC:3\nD:4")


def mathvision_hub(folder: Path) -> Written:
    rows = [
        {"id": str(k + 1), "question": question(k), "options": COLOURS if k % 2 == 0 else []}
        | {"image": f"images/{k}.jpg", "decoded_image": image(k), "answer": "B" if k % 2 == 0 else "3", "solution": ""}
        | {"level": 2, "subject": "algebra"}
        for k in range(COUNT)
    ]
    parquet(folder / "data/testmini-00000-of-00001.parquet", rows, options=pa.list_(pa.string()))
    return Written(folder, ["\\boxed{B}", "\\boxed{3}"] * 3, f"{BOXED}{PLAIN}\nChoices: {OPTIONS.strip()}")


def mathvision_tsv(folder: Path) -> Written:
    rows = [
        table(k, question=question(k), answer="B" if k % 2 == 0 else "3", category="algebra", level=2)
        | {"choices": str(COLOURS if k % 2 == 0 else [])}
        for k in range(COUNT)
    ]
    tsv(folder / "MathVision_MINI.tsv", rows)
    return Written(folder, ["\\boxed{B}", "\\boxed{3}"] * 3, PLAIN)


KEYS = ["2steps_1", "2steps_2", "2steps_multi", "3steps_1", "3steps_2", "3steps_3", "3steps_multi"]


def _wemath(k: int) -> dict[str, Any]:
    return {"ID": "17", "key": KEYS[k], "question": question(k), "question number": k, "knowledge concept": "Area"}


def wemath_hub(folder: Path) -> Written:
    rows = [
        {**_wemath(k), "split": "testmini", "option": "A. red; B. blue; C. green; D. white", "answer": LETTERS[k % 4]}
        | {"image_path": image(k), "knowledge concept description": "d"}
        for k in range(7)
    ]
    parquet(folder / "data/testmini-00000-of-00001.parquet", rows)
    right = [f"Answer: {LETTERS[k % 4]}" for k in range(7)]
    return Written(folder, right, f"Question: {PLAIN}\nOptions:\n{OPTIONS}", wrong="Answer: E")


def wemath_tsv(folder: Path) -> Written:
    tsv(folder / "WeMath.tsv", [table(k, **_wemath(k), **choices(k), requirement="r") for k in range(7)])
    return dataclasses.replace(wemath_hub(beside(folder)), path=folder)


BRACES = " \n\n\nLet's think step by step and give the final answer in curly braces,  like this: {final answer}"


def zerobench_hub(folder: Path) -> Written:
    rows = [
        {"question_id": f"{k // 2}_{k % 2}", "question_text": question(k)}
        | {"question_images_decoded": [image(i) for i in range(1 + k % 2)], "question_images": ["a.png"]}
        | {"question_answer": "7", "image_attribution": "own"}
        for k in range(COUNT)
    ]
    types = {"question_images_decoded": pa.list_(IMAGE)}
    parquet(folder / "data/zerobench_subquestions-00000-of-00001.parquet", rows, **types)
    parquet(folder / "data/zerobench-00000-of-00001.parquet", rows[:1], **types)
    return Written(folder, ["It is {7}."] * COUNT, PLAIN + BRACES, wrong="It is {8}.", images=(1, 2) * 3)


def zerobench_tsv(folder: Path) -> Written:
    rows = [table(k, question=question(k), answers="7") for k in range(COUNT)]
    rows[2]["image"] = str([sets.encoded(1), sets.encoded(2)])
    tsv(folder / "zerobench_sub.tsv", rows)
    written = zerobench_hub(beside(folder))
    return dataclasses.replace(written, path=folder, images=(1, 1, 2, 2, 1, 1))


FORMULA = "Handwritten Mathematical Expression Recognition"


def ocrbench_hub(folder: Path) -> Written:
    rows = [
        {"dataset": ("IIIT5K", "HME100k")[k % 2], "question": question(k), "answer": ["x ^ 2", "y"][: 2 - k % 2]}
        | {"question_type": ("Regular Text Recognition", FORMULA)[k % 2], "image": image(k)}
        for k in range(COUNT)
    ]
    parquet(folder / "data/test-00000-of-00001.parquet", rows)
    return Written(folder, ["it reads Y", "x^2"] * 3, PLAIN, wrong="none of it")


def ocrbench_tsv(folder: Path) -> Written:
    rows = [
        table(k, question=question(k), answer=str(["x ^ 2", "y"][: 2 - k % 2]))
        | {"category": ("Regular Text Recognition", FORMULA)[k % 2]}
        for k in range(COUNT)
    ]
    tsv(folder / "OCRBench.tsv", rows)
    return dataclasses.replace(ocrbench_hub(beside(folder)), path=folder)


FORMS = ("hub", "lmms", "tsv", "json", "jsonl")
SETS: Mapping[tuple[str, str], Callable[[Path], Written]] = {
    (name, form): value
    for module in (sets, sys.modules[__name__])
    for function, value in vars(module).items()
    for name, _, form in [function.rpartition("_")]
    if form in FORMS and name not in ("", "as")
}
"""Functions that write a set into an empty folder, by benchmark and form."""
