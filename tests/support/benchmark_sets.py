"""Small sets of the published benchmarks, in the very schemas in which they are distributed.

Column names and types are those of the Hugging Face data sets (Image is struct<bytes, path>, ClassLabel an integer), of
VLMEvalKit's tables and of annotation files. ``SETS`` has a function for each benchmark and form.
"""

from __future__ import annotations

import base64
import csv
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.support.records import png

IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
WIDTH, HEIGHT = 40, 20
COUNT = 6
LETTERS = "ABCD"
COLOURS = ["red", "blue", "green", "white"]
OPTIONS = "A. red\nB. blue\nC. green\nD. white\n"
SELECT = "Please select the correct answer from the options above. \n"


@dataclasses.dataclass(frozen=True)
class Written:
    """A small set, and what reading it must give."""

    path: Path
    right: Sequence[str]
    """A right reply for each item."""
    prompt: str
    """The question of the first item."""
    wrong: str = "I cannot see it."
    images: Sequence[int] = (1,)
    """Number of images of the items; of one, all have it."""


def image(seed: int) -> dict[str, Any]:
    """The value of an Image."""
    return {"bytes": png(WIDTH, HEIGHT, seed), "path": f"{seed}.png"}


def encoded(seed: int) -> str:
    """The value of VLMEvalKit's column ``image``."""
    return base64.b64encode(png(WIDTH, HEIGHT, seed)).decode()


def parquet(file: Path, rows: Sequence[dict[str, Any]], **types: pa.DataType) -> None:
    """Write rows with row groups of four, as a file of several groups; ``types`` names those that are not inferred."""
    file.parent.mkdir(parents=True, exist_ok=True)
    columns = {}
    for name in rows[0]:
        kind = types.get(name.replace(" ", "_"), IMAGE if isinstance(rows[0][name], dict) else None)
        columns[name] = pa.array([row[name] for row in rows], kind)
    pq.write_table(pa.table(columns), file, row_group_size=4)


def tsv(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as ``DataFrame.to_csv(sep="\\t", index=False)`` does; None is an empty cell."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as content:
        writer = csv.DictWriter(content, list(rows[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def as_json(file: Path, value: Any) -> None:
    """Write JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def save(folder: Path, name: str, seed: int) -> str:
    """Write an image; its name."""
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(png(WIDTH, HEIGHT, seed))
    return name


def beside(folder: Path) -> Path:
    """A folder for another form of the same set."""
    return folder.with_name(f"{folder.name}-other")


def table(index: int, **values: Any) -> dict[str, Any]:
    """A row of VLMEvalKit; every second one refers to the image of the row before."""
    return {"index": index, "image": str(index - 1) if index % 2 else encoded(index), **values}


def choices(index: int) -> dict[str, str]:
    """The columns of options and the answer."""
    return {**dict(zip(LETTERS, COLOURS, strict=True)), "answer": LETTERS[index % 4]}


def question(index: int) -> str:
    """A question with a line break, a tab and quotes, and a marker that is meant as text."""
    return f'What "colour"\nis\tcup {index}, <image>?'


PLAIN = 'What "colour"\nis\tcup 0, <\\image>?'
"""The first question as a prompt has it."""
LETTER = [LETTERS[k % 4] for k in range(COUNT)]


def chartqa_hub(folder: Path) -> Written:
    rows = [
        {"image": image(k), "query": question(k), "label": [f"{k + 1}0"], "human_or_machine": k % 2}
        for k in range(COUNT)
    ]
    parquet(folder / "data/test-00000-of-00001.parquet", rows, human_or_machine=pa.int64())
    return Written(
        folder, [f"{k + 1}0.1" for k in range(COUNT)], f"{PLAIN}\nAnswer the question using a single word or phrase."
    )


def chartqa_lmms(folder: Path) -> Written:
    kinds = ("human_test", "augmented_test")
    rows = [{"type": kinds[k % 2], "question": question(k), "answer": "yes", "image": image(k)} for k in range(COUNT)]
    parquet(folder / "data/test-00000-of-00001.parquet", rows)
    return dataclasses.replace(chartqa_hub(beside(folder)), path=folder / "data", right=["Yes"] * COUNT)


def chartqa_tsv(folder: Path) -> Written:
    rows = [
        table(k, question=question(k), answer="['3', 'three']", split=("test_human", "test_augmented")[k % 2])
        for k in range(COUNT)
    ]
    tsv(folder / "ChartQA_TEST.tsv", rows)
    return dataclasses.replace(chartqa_hub(beside(folder)), path=folder, right=["three"] * COUNT)


def _mathvista(k: int) -> tuple[dict[str, Any], str]:
    """Fields of a question, and a right reply."""
    kind = ("text", "integer", "float")[k % 3]
    many = kind == "text"
    answer = {"text": "blue", "integer": "7", "float": "1.2"}[kind]
    fields = {
        "question_type": "multi_choice" if many else "free_form", "answer_type": kind, "answer": answer,
        "precision": 1.0 if kind == "float" else None,
    }  # fmt: skip
    return fields, "(B) blue" if many else answer


def mathvista_hub(folder: Path) -> Written:
    rows = []
    for k in range(COUNT):
        fields, _ = _mathvista(k)
        rows.append(
            {"pid": str(k + 1), "question": "?", "image": f"images/{k}.jpg", "decoded_image": image(k)}
            | {"choices": COLOURS if k % 3 == 0 else [], "unit": None, **fields}
            | {"metadata": {"split": "testmini", "skills": ["counting"]}, "query": f"Hint: h.\n{question(k)}"}
        )
    types = {"metadata": pa.struct({"split": pa.string(), "skills": pa.list_(pa.string())}), "unit": pa.string()}
    types |= {"precision": pa.float64(), "choices": pa.list_(pa.string())}
    parquet(folder / "data/testmini-00000-of-00001.parquet", rows, **types)
    parquet(folder / "data/test-00000-of-00001.parquet", rows[:1], **types)
    return Written(folder, [_mathvista(k)[1] for k in range(COUNT)], f"Hint: h.\n{PLAIN}")


def mathvista_tsv(folder: Path) -> Written:
    rows = []
    for k in range(COUNT):
        fields, _ = _mathvista(k)
        many = fields["question_type"] == "multi_choice"
        option = "B" if many else None
        rows.append(
            table(
                k,
                question=f"Hint: h.\n{question(k)}",
                **fields,
                answer_option=option,
                choices=str(COLOURS if many else []),
            )
        )
    tsv(folder / "MathVista_MINI.tsv", rows)
    return dataclasses.replace(mathvista_hub(beside(folder)), path=folder)


def mmmu_hub(folder: Path) -> Written:
    """Per-subject folders; the fourth question of each is open, the second has its images in the options."""
    for subject in ("Art", "Music"):
        rows = []
        for k in range(4):
            texts = str(["<image 2>", "<image 1>", 'it\'s "x"', "none"] if k == 1 else COLOURS)
            rows.append(
                {"id": f"validation_{subject}_{k + 1}", "question": "Which, <image 1>?" if k == 0 else f"Which {k}?"}
                | {"options": "[]" if k == 3 else texts, "explanation": ""}
                | {f"image_{i}": image(i) if i < 3 else None for i in range(1, 8)}
                | {"img_type": "['Figure']", "answer": "1,000" if k == 3 else LETTERS[k], "topic_difficulty": "Easy"}
                | {"question_type": "open" if k == 3 else "multiple-choice", "subfield": "x"}
            )
        types = {f"image_{i}": IMAGE for i in range(1, 8)}
        parquet(folder / subject / "validation-00000-of-00001.parquet", rows, **types)
        parquet(folder / subject / "test-00000-of-00001.parquet", rows[:1], **types)
    prompt = f"Question: Which, <image>?\nOptions:\n{OPTIONS}{SELECT}"
    return Written(folder, ["(A)", "(B)", "(C)", "It is 1000."] * 2, prompt, images=(1, 2, 2, 2) * 2)


def mmmu_tsv(folder: Path) -> Written:
    images = str([encoded(1), encoded(2)])
    rows = [
        {"index": k, "id": f"validation_Art_{k}", "question": "Which, <image 1>?", "image": images, "category": "Art"}
        | {**choices(k), "split": "dev" if k == 5 else "validation"}
        for k in range(COUNT)
    ]
    tsv(folder / "MMMU_DEV_VAL.tsv", rows)
    return dataclasses.replace(mmmu_hub(beside(folder)), path=folder, right=[f"({x})" for x in LETTER[:5]], images=(1,))


BOX_PROMPT = (
    "Locate the element in the screenshot for this instruction: close the window\nOutput its bbox coordinates using "
    "the format of [x1, y1, x2, y2] using relative coordinates from 0.0000 to 1.0000."
)
BOX = "[0.2500, 0.5000, 0.5000, 0.9000]"
"""A reply; its centre is at pixel (15, 14)."""


def screenspot_v2_json(folder: Path) -> Written:
    for k, platform in enumerate(("desktop", "mobile", "web")):
        name = save(folder / "screenspotv2_image", f"{platform}_0.png", k)
        rows = [
            {"img_filename": name, "bbox": [10, 10, 10, 8], "instruction": "close the window", "data_type": kind}
            | {"data_source": "windows"}
            for kind in ("text", "icon")
        ]
        as_json(folder / f"screenspot_{platform}_v2.json", rows)
    return Written(folder, [BOX] * 6, BOX_PROMPT, wrong="[0.0, 0.0, 0.1, 0.1]")


def screenspot_v2_tsv(folder: Path) -> Written:
    for platform in ("Desktop", "Mobile", "Web"):
        rows = [
            table(k, question="close the window", bbox="[10, 10, 10, 8]", data_type="icon", data_source="ios")
            for k in range(2)
        ]
        tsv(folder / f"ScreenSpot_v2_{platform}.tsv", rows)
    return dataclasses.replace(screenspot_v2_json(beside(folder)), path=folder)


def screenspot_pro_json(folder: Path) -> Written:
    for k, app in enumerate(("blender_windows", "excel_macos")):
        name = save(folder / "images", f"{app}/shot.png", k)
        rows = [
            {"img_filename": name, "bbox": [10, 10, 20, 18], "instruction": "close the window", "instruction_cn": "关"}
            | {"id": f"{app}_{i}", "application": app, "platform": "windows", "img_size": [WIDTH, HEIGHT]}
            | {"ui_type": kind, "group": ("Creative", "Office")[k]}
            for i, kind in enumerate(("text", "icon", "icon"))
        ]
        as_json(folder / f"annotations/{app}.json", rows)
    return Written(folder, [BOX] * 6, BOX_PROMPT, wrong="[0.0, 0.0, 0.1, 0.1]")


def screenspot_pro_tsv(folder: Path) -> Written:
    for group in ("Creative", "CAD"):
        rows = [
            table(k, question="close the window", bbox="[10, 10, 20, 18]", ui_type="icon", application="x")
            for k in range(3)
        ]
        tsv(folder / f"ScreenSpot_Pro_{group}.tsv", rows)
    return dataclasses.replace(screenspot_pro_json(beside(folder)), path=folder)


def cuactspot_json(folder: Path) -> Written:
    """A drag with a banned region, clicks in any order, and a click."""

    def polygon(kind: str, rank: str, left: float) -> dict[str, Any]:
        points = [[left, 4.5], [left + 8, 4.5], [left + 8, 15.5], [left, 15.5]]
        return {"id": "R1", "type": kind, "points": points, "rank": rank, "visible": True}

    drag = [polygon("Target", "1", 2.0), polygon("Target", "2", 26.0), polygon("Banned", "", 14.0)]
    every = [polygon("Target", "", 2.0), polygon("Target", "", 26.0)]
    right = []
    for k in range(5):
        id = f"{('Canvas', 'Text')[k % 2]}-{k:04x}"
        polygons = [drag, every, drag[:1]][k % 3]
        save(folder, f"{id}.png", k)
        extra = {"task_en": "Move it.", "modality": id.partition("-")[0]} if k % 2 == 0 else {"task_en": "Move it."}
        as_json(folder / f"{id}.json", {"image_id": id, "task": "移动", "polygons": polygons, "masks": [], **extra})
        right.append(["[0.15, 0.5] [0.75, 0.5]", "[0.75, 0.5], [0.15, 0.5]", "[0.15, 0.5]"][k % 3])
    # Read in the order of the file names.
    right = [right[k] for k in (0, 2, 4, 1, 3)]
    prompt = (
        "The instruction:\nMove it.\n\nIdentify the point or points in the screenshot that are needed to complete the "
        "instruction, in order. Output each point in the format of [x, y] using relative coordinates from 0.0000 to "
        "1.0000, and nothing else."
    )
    return Written(folder, right, prompt, wrong="[0.45, 0.5] [0.75, 0.5]")
