"""The public scorers, loaded from their sources without what they import for other purposes.

Needs numpy, pandas, Levenshtein and latex2sympy2, and no file of this repository.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import itertools
import json
import logging
import os
import random
import re
import string
import tempfile
import types
from collections import defaultdict
from pathlib import Path
from typing import Any

import Levenshtein
import numpy as np
import pandas as pd

TAGS = [["<think>", "</think>"], ["<analysis>", "</analysis>"]]
"""The default of lmms-eval's --reasoning_tags."""


def load_file(path: Path) -> types.ModuleType:
    """A file of Python as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_names(path: Path, names: str, known: dict[str, Any]) -> types.SimpleNamespace:
    """The functions, classes and constants with these names (or "Class.method") in a file, which may use ``known``."""
    nodes, wanted = [], set(names.split())
    for node in ast.parse(path.read_text()).body:
        name = node.targets[0] if isinstance(node, ast.Assign) else node
        if getattr(name, "id", getattr(name, "name", None)) in wanted:
            nodes.append(node)
        elif isinstance(node, ast.ClassDef):
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and f"{node.name}.{method.name}" in wanted:
                    method.name, method.decorator_list = f"{node.name}_{method.name}", []
                    nodes.append(method)
    namespace = dict(known)
    exec(compile(ast.Module(nodes, []), str(path), "exec"), namespace)
    return types.SimpleNamespace(**namespace)


class Public:
    """The rules of the public projects: ``rule(prediction, record)`` → value, after lmms-eval's removal of thoughts."""

    def __init__(self, lmms_eval: Path, vlmevalkit: Path, mmmu: Path, we_math: Path, mathvista: Path) -> None:
        tasks, kit = lmms_eval / "lmms_eval/tasks", vlmevalkit / "vlmeval"
        self._strip = load_file(lmms_eval / "lmms_eval/api/reasoning.py").strip_reasoning_tags
        self._chartqa = load_file(tasks / "chartqa/utils.py").relaxed_correctness
        self._kit_chartqa = load_names(
            kit / "dataset/utils/vqa_eval.py", "relaxed_correctness", {"Optional": Any}
        ).relaxed_correctness
        base = type("ExtendedRegexFilter", (), {"__init__": lambda self, *a, **k: None})
        self._ai2d = load_names(
            tasks / "ai2d/utils.py", "MultiChoiceRegexFilter", {"re": re, "ExtendedRegexFilter": base}
        )
        metrics = load_names(
            lmms_eval / "lmms_eval/api/metrics.py", "exact_match_hf_evaluate", {"re": re, "np": np, "string": string}
        )
        self._exact = metrics.exact_match_hf_evaluate
        self._mmstar = load_file(tasks / "_task_utils/mcq_extract.py").extract_mcq_answer
        self._vstar = load_names(
            tasks / "vstar_bench/utils.py", "extract_answer_letter", {"re": re}
        ).extract_answer_letter
        matching = load_names(
            kit / "utils/matching_util.py",
            "_VERBOSE_ANSWER_RE can_infer_option can_infer_text can_infer",
            {"os": os, "re": re, "string": string, "cp": __import__("copy"), "logger": logging.getLogger()},
        )
        self._can_infer = matching.can_infer
        self._post_check = load_names(
            kit / "dataset/utils/mathvista.py", "list_to_dict post_check", {"can_infer": matching.can_infer}
        ).post_check
        self._mmmu = load_file(mmmu / "mmmu/utils/eval_utils.py")
        self._mathvista = load_names(
            mathvista / "evaluation/calculate_score.py",
            "get_most_similar normalize_extracted_answer safe_equal",
            {"re": re, "distance": Levenshtein.distance, "logging": logging},
        )
        punctuation = load_names(kit / "smp/misc.py", "process_punctuation", {})
        self._yorn = load_names(
            kit / "dataset/utils/yorn.py",
            "YOrN_Extraction Hallusion_rating",
            {
                "process_punctuation": punctuation.process_punctuation,
                "defaultdict": defaultdict,
                "np": np,
                "pd": pd,
                "load": lambda frame: frame,
            },
        )
        frames = {
            "pd": pd,
            "re": re,
            "load": lambda frame: frame,
            "dump": lambda *_: None,
            "tqdm": lambda each: each,
            "get_intermediate_file_path": lambda *_: "",
        }
        self._kit = load_names(kit / "dataset/image_vqa.py", "ZEROBench.evaluate OCRBench.evaluate", frames)
        screenshots = {
            **frames,
            "Image": types.SimpleNamespace(open=lambda path: types.SimpleNamespace(size=json.loads(path))),
            **{"ast": ast, "defaultdict": defaultdict, "itertools": itertools, "json": json, "np": np},
            "os": types.SimpleNamespace(path=types.SimpleNamespace(join=lambda _, last: last), environ={}),
            "logger": logging.getLogger(),
        }
        self._click = load_names(
            kit / "dataset/GUI/screenspot.py", "parse_bbox_aguvis ScreenSpot.evaluate_point", screenshots
        )
        self._point = load_file(tasks / "screenspot_v2/utils.py")
        self._rec = load_file(tasks / "screenspot/utils_rec.py")
        equality = load_file(tasks / "mathvision/eval_utils.py")
        self._mathvision = load_names(tasks / "mathvision/utils.py", "mathvision_process_results", vars(equality))
        self._wemath = load_names(
            we_math / "evaluation/four_dimensional_metrics.py",
            "load_and_process_data process_steps_data calculate_metrics compute_final_scores update_main_results_df",
            {"pd": pd, "json": json},
        )

    def think_strip(self, prediction: str) -> str:
        return self._strip(prediction, TAGS)

    def chartqa_relaxed(self, prediction: str, record: dict) -> float:
        answers = record["answer"] if isinstance(record["answer"], list) else [record["answer"]]
        values = [self._chartqa(self.think_strip(prediction), each) for each in answers]
        assert values == [self._kit_chartqa(each, self.think_strip(prediction).strip()) for each in answers]
        return float(max(values))

    def mathvista_normalize(self, prediction: str, record: dict) -> float:
        keys = ("choices", "question_type", "answer_type", "precision")
        extraction = self._mathvista.normalize_extracted_answer(
            self.think_strip(prediction), *(record[key] for key in keys)
        )
        return float(self._mathvista.safe_equal(extraction, record["answer"]))

    def mathvista_prefetch(self, prediction: str, record: dict) -> float:
        line = {**record, "prediction": self.think_strip(prediction), "choices": str(record["choices"])}
        found = self._post_check(line, prefetch=True)
        if record["question_type"] == "multi_choice":
            return float(found == record["answer_option"])
        return float(found is not False)

    def mmmu_mc(self, prediction: str, record: dict) -> float:
        letters = [chr(65 + index) for index in range(len(record["options"]))]
        choice, random.choice = random.choice, lambda _: None
        try:
            found = self._mmmu.parse_multi_choice_response(
                self.think_strip(prediction), letters, dict(zip(letters, record["options"], strict=True))
            )
        finally:
            random.choice = choice
        return float(self._mmmu.eval_multi_choice(record["answer"], found))

    def mmmu_open(self, prediction: str, record: dict) -> float:
        found = self._mmmu.parse_open_response(self.think_strip(prediction))
        return float(self._mmmu.eval_open(record["answer"], found))

    def mcq(self, prediction: str, record: dict) -> float:
        return float(self._can_infer(self.think_strip(prediction), dict(record["options"])) == record["answer"])

    def ai2d_lmms(self, prediction: str, record: dict) -> float:
        filtered = self._ai2d.MultiChoiceRegexFilter().apply([[self.think_strip(prediction)]], [None])
        result = self._exact([filtered[0].strip()], [record["answer"]], ignore_case=True, ignore_punctuation=True)
        return float(result["exact_match"])

    def mmstar_lmms(self, prediction: str, record: dict) -> float:
        return float(self._mmstar(self.think_strip(prediction), list("ABCD")) == record["answer"])

    def vstar_lmms(self, prediction: str, record: dict) -> float:
        return float(self._vstar(self.think_strip(prediction)) == record["answer"])

    def hallusion_yesno(self, prediction: str, record: dict) -> float:
        return float(self._yorn.YOrN_Extraction(self.think_strip(prediction)) == record["answer"])

    def hallusion_groups(self, records: list[dict]) -> dict[str, float]:
        frame = pd.DataFrame(
            {
                "index": "_".join(["image", *each["l2_category"].split("_"), *(str(each[key]) for key in KEYS)]),
                "l2-category": each["l2_category"],
                "score": bool(each["correct"]),
            }
            for each in records
        )
        rating = self._yorn.Hallusion_rating(frame).iloc[0]
        return {name: float(rating[name]) / 100 for name in ("aAcc", "fAcc", "qAcc")}

    def mathvision_equal(self, prediction: str, record: dict) -> float:
        with contextlib.redirect_stdout(io.StringIO()):
            found = self._mathvision.mathvision_process_results(record, [self.think_strip(prediction)])
        return float(found["mathvision_standard_eval"]["scores"][0])

    def screenspot_point(self, prediction: str, record: dict) -> float:
        width, height = record["image_size"]
        document = {"bbox": record["bbox_xyxy_norm"], "image_width": width, "image_height": height}
        result = self._point.screenspot_v2_process_results(document, [self.think_strip(prediction)])
        return float(result["screenspot_v2_action_acc"]["correct"])

    def screenspot_bbox(self, prediction: str, record: dict) -> float:
        box = self._rec.parse_float_sequence_within(self.think_strip(prediction))
        return float(self._rec.compute_center_accuracy(record["bbox_xyxy_norm"], box))

    def screenspot_pixel_click(self, prediction: str, record: dict) -> float:
        line = {
            "bbox": record["bbox_xywh_px"],
            "image_path": json.dumps(record["image_size"]),
            "prediction": self.think_strip(prediction),
            **{"data_type": "text", "data_source": "", "question": ""},
        }
        with np.errstate(all="ignore"):
            rating = self._click.ScreenSpot_evaluate_point(types.SimpleNamespace(img_root=""), pd.DataFrame([line]))
        return float(rating["Overall_Accuracy"]) / 100

    def ocrbench(self, prediction: str, record: dict) -> float:
        line = {
            "prediction": self.think_strip(prediction),
            "answer": repr(record["answers"]),
            "category": record["question_type"],
        }
        return float(self._kit.OCRBench_evaluate(None, pd.DataFrame([line]))["Final Score"])

    def wemath_letter(self, prediction: str, record: dict) -> float:
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump([{"response": self.think_strip(prediction), "answer": record["answer"]}], file)
            file.flush()
            return float(self._wemath.load_and_process_data(file.name)["joker"][0])

    def wemath_four_dim(self, two_step: list[list[int]], three_step: list[list[int]]) -> dict[str, Any]:
        """The figures of the table that We-Math prints, as texts."""
        rows = [
            {"ID": number, "key": f"{len(row) - 1}steps_{step}", "joker": bool(value)}
            for number, row in enumerate([*two_step, *three_step])
            for step, value in zip([*range(1, len(row)), "multi"], row, strict=True)
        ]
        frame = pd.DataFrame(rows)
        merged = [
            self._wemath.process_steps_data(frame[frame["key"].str.contains(f"{steps}steps")].copy(), steps)
            for steps in (2, 3)
        ]
        counts, rates = self._wemath.compute_final_scores(self._wemath.calculate_metrics(*merged), 525)
        table = types.SimpleNamespace(_append=lambda row, ignore_index: row)
        return self._wemath.update_main_results_df(table, "", counts, rates)

    def zerobench_braces(self, prediction: str, record: dict) -> float:
        frame = pd.DataFrame([{"prediction": self.think_strip(prediction), "answers": record["answer"], "index": 0}])
        return float(self._kit.ZEROBench_evaluate(None, frame)["accuracy"])


KEYS = ("set_id", "figure_id", "question_id")
