"""Reports of generated evaluations, as files."""

from __future__ import annotations

import json
import re

import pytest

from phivision_jax.cli.main import main
from phivision_jax.evaluation.report import rows, write_report
from phivision_jax.evaluation.report.markdown import markdown
from phivision_jax.io.html import Section, Table
from tests.support.evaluation_runs import BENCHMARKS, HOSTILE, row, sample_rows, write_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluations")
    ours, theirs = folder / "ours", folder / "theirs"
    write_run(ours, sample_rows(ours, 60), note=HOSTILE)
    write_run(theirs, sample_rows(theirs, 60, seed=1))
    write_report(ours, theirs, BENCHMARKS)
    return ours, theirs


def loaded(text: str) -> object:
    """The argument of a data file's call."""
    return json.loads(re.fullmatch(r"evaluation\.\w+\((?:\d+, )?(.*)\);\n", text, re.DOTALL)[1])


def test_report_has_all_parts(runs):
    page = (runs[0] / "report.html").read_text()
    titles = re.findall("<h2>(.*)</h2>", page)
    assert titles == [
        "Scores", "Comparison item by item", "Accuracy against cost", "Cost", "Choice of the mode",
        "Length of thoughts", "Differences from the published figures", "Further figures", "Published figures",
        "Answers", "Settings",
    ]  # fmt: skip
    addresses = re.findall(r'(?:src|srcset|href)="([^"]*)"', page)
    addresses.remove("data:,")  # no icon
    assert len(addresses) == 3 + 2 * 4 and all((runs[0] / address).exists() for address in addresses)
    assert HOSTILE not in page and "window.hacked=1&lt;/script&gt;" in page
    assert len(page) < 60_000  # data and figures are beside it


def test_report_json_has_all_numbers(runs):
    report = json.loads((runs[0] / "report.json").read_text())
    assert len(report["scores"]) == 9 and len(report["choices"]) == 3 and len(report["comparison"]) == 9
    first = report["scores"][0]
    assert first["benchmark"] == "chartqa" and first["score"]["low"] < first["score"]["mean"] < first["score"]["high"]
    assert report["settings"]["note"] == HOSTILE and "NaN" not in json.dumps(report)


def test_markdown_has_a_table_of_scores(runs):
    lines = (runs[0] / "report.md").read_text().splitlines()
    header = next(line for line in lines if line.startswith("| benchmark | mode | scored by |"))
    assert lines[lines.index(header) + 2].startswith("| ChartQA | auto | rule |")
    assert any(line.startswith("| HallusionBench | auto | judge gpt-4o-mini on ") for line in lines)


def test_markdown_escapes_texts():
    text = markdown("a|b", [Section("<i>", table=Table(("x",), [("a|b\n*c*",)]))])
    assert text == "# a\\|b\n\n## \\<i\\>\n\n| x |\n| --- |\n| a\\|b \\*c\\* |\n"


def test_data_files_hold_every_row_once(runs):
    index = loaded((runs[0] / "data/index.js").read_text())
    chunks = [loaded((runs[0] / f"data/rows-{n}.js").read_text()) for n in range(len(index["starts"]))]
    assert [len(index["columns"][name]) for name in index["columns"]] == [180] * 11
    assert sum(map(len, chunks)) == 180 and index["starts"][1:] == [len(chunks[0])] * (len(chunks) - 1)
    row_1 = next(i for i, item in enumerate(index["columns"]["item"]) if HOSTILE in item)
    assert chunks[0][row_1]["question"] == f"Question {HOSTILE}"
    assert "<" not in (runs[0] / "data/rows-0.js").read_text()


def test_modes_of_an_item_are_neighbours(tmp_path):
    shuffled = [row(item=f"{i}", mode=mode) for mode in ("nothink", "auto") for i in range(3)]
    (tmp_path / "rows-9.js").write_text("of an earlier report")
    assert rows.write_rows(tmp_path, shuffled, {}, None) == ["index.js", "rows-0.js"]
    assert not (tmp_path / "rows-9.js").exists()
    columns = loaded((tmp_path / "index.js").read_text())["columns"]
    assert columns["item"] == ["0", "0", "1", "1", "2", "2"] and columns["mode"] == [0, 2] * 3


def test_chunks_end_after_so_many_characters(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "CHUNK_CHARACTERS", 2000)
    files = rows.write_rows(tmp_path, [row(item=f"{i}", thought="x" * 900) for i in range(7)], {}, None)
    starts = loaded((tmp_path / "index.js").read_text())["starts"]
    assert len(files) == 1 + len(starts) and 4 <= len(starts) <= 7 and starts == sorted(set(starts))


def test_reference_names_the_option(tmp_path):
    option = row(record={"answer": "B", "options": {"A": "cat", "B": "dog"}})
    rows.write_rows(tmp_path, [option, row(item="2", record={"x": 1})], {}, None)
    assert loaded((tmp_path / "index.js").read_text())["columns"]["reference"] == ["B: dog", '{"x": 1}']


def test_command_writes_the_report_of_unknown_benchmarks(tmp_path, capsys):
    run = write_run(tmp_path / "run", [row(benchmark="mine", item=f"{i}", value=i % 2 / 1) for i in range(8)])
    main(["report", str(run)])
    assert "50.0" in capsys.readouterr().out and "mine" in (run / "report.md").read_text()


def test_command_compares(runs, capsys):
    main(["report", str(runs[0]), "--compare", str(runs[1])])
    assert "Comparison item by item" in capsys.readouterr().out


@pytest.mark.parametrize("shards, problem", [(False, "run.json does not exist"), (True, "no results yet")])
def test_command_without_results(tmp_path, capsys, shards, problem):
    if shards:
        write_run(tmp_path, [])
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path)])
    assert problem in capsys.readouterr().err


def test_runs_without_a_common_item_are_an_error(tmp_path):
    ours, theirs = (write_run(tmp_path / name, [row(item=name)]) for name in ("a", "b"))
    with pytest.raises(ValueError, match="no item in common"):
        write_report(ours, theirs)
