"""Predictions in the forms of others, scored through ``phivision score``."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from phivision_jax.cli.main import main
from phivision_jax.evaluation.benchmark import Item
from phivision_jax.evaluation.predictions import read_predictions
from phivision_jax.evaluation.results import load_results
from tests.support.paths import ROOT
from tests.support.sums_benchmark import write_sums

SUMS = ROOT / "tests" / "support" / "sums_benchmark.py"
ITEMS = [Item(f"T:{10 + i}", "?", (), {}) for i in range(4)]


def write(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("a.jsonl", [{"item": "T:13", "prediction": "x"}, {"id": "T:10", "prediction": "y\n"}]),
        ("a.jsonl", [{"index": 13, "prediction": "x"}, {"index": 10.0, "prediction": "y\n"}]),
        (
            "m_samples_t.jsonl",
            [{"doc_id": 3, "target": "x", "resps": [["x"]]}, {"doc_id": 0, "filtered_resps": ["y\n"]}],
        ),
        (
            "m.tsv",
            [{"index": 13, "question": "?", "prediction": "x"}, {"index": 10, "question": "", "prediction": "y\n"}],
        ),
        ("m.csv", [{"index": "T:13", "prediction": "x"}, {"index": "T:10", "prediction": "y\n"}]),
        ("m.json", [{"index": 13, "prediction": "x"}, {"index": 10, "prediction": "y\n"}]),
    ],
)
def test_forms(tmp_path, name, rows):
    found = read_predictions(write(tmp_path / name, rows), ITEMS)
    assert found.numbers == (0, 3) and list(found.texts) == ["y\n", "x"]


@pytest.mark.parametrize(
    ("name", "rows", "problem"),
    [
        ("a.jsonl", [{"item": "T:9", "prediction": "x"}], "row 1: 'T:9' is of no item; ids are like 'T:10'"),
        ("a.jsonl", [{"doc_id": 4, "resps": ["x"]}], "row 1 has the doc_id 4, and the benchmark 4 items from 0"),
        ("a.jsonl", [{"item": "T:10", "prediction": "x"}] * 2, "row 2 is another prediction for item T:10"),
        ("a.jsonl", [{"prediction": "x"}], "row 1 names no item"),
        ("a.jsonl", [{"item": "T:10", "resps": []}], "row 1 has no text"),
        ("a.jsonl", [], "has no predictions"),
        ("a.json", [1], "must contain an array of objects"),
        ("a.xlsx", [{"index": 1}], r"give \.jsonl, \.json, \.tsv or \.csv; of VLMEvalKit, set PRED_FORMAT=tsv"),
    ],
)
def test_mistakes(tmp_path, name, rows, problem):
    with pytest.raises(ValueError, match=problem):
        read_predictions(write(tmp_path / name, rows), ITEMS)


def test_ambiguous_index(tmp_path):
    file = write(tmp_path / "a.tsv", [{"index": 1, "prediction": "x"}])
    with pytest.raises(ValueError, match="'1' is of 2 items"):
        read_predictions(file, [Item("A:1", "?", (), {}), Item("B:1", "?", (), {})])


def test_score_writes_the_reports_of_an_evaluation(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sums = write_sums(tmp_path / "sums.json", 8)
    rows = [{"index": i, "prediction": a + b + (i == 3), "thinking": "hm"} for i, (a, b, _) in enumerate(sums[:6])]
    file = write(tmp_path / "model_sums.tsv", rows)
    for _ in range(2):  # the second replaces the first
        command = [f"--benchmark={SUMS}", f"--benchmark-data={tmp_path}/sums.json", f"--out={tmp_path}/out"]
        main(["score", str(file), *command])
    settings, results = load_results(tmp_path / "out")
    assert settings["about"]["model"] == "model_sums" and len(results) == 6
    assert [result.value for result in results] == [1, 1, 1, 0, 1, 1]
    assert {(result.thought, result.taken) for result in results} == {("hm", "think")}
    assert json.loads((tmp_path / "out" / "report.json").read_text())["summaries"][0]["figures"][
        "score"
    ] == pytest.approx(500 / 6)
    assert "2 of 8 items have no prediction" in capsys.readouterr().out
