"""Tests of ``phivision data stats`` and ``show`` on the command line."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest

from phivision_jax.cli import main
from phivision_jax.processor import Processor
from tests.support.datasets import write_dataset
from tests.support.records import CONFIG, make_record, mixed_records


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.small(CONFIG)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, processor):
    return write_dataset(tmp_path_factory.mktemp("data") / "set", mixed_records(24), processor)


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*arguments: object) -> tuple[int, str]:
        """Exit code and output; white space is joined, since messages wrap."""
        monkeypatch.setattr(sys, "argv", ["phivision", "data", *map(str, arguments)])
        try:
            main.main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        shown = capsys.readouterr()
        return code, " ".join((shown.out + shown.err).split())

    return call


def test_stats_writes_page_figure_and_numbers(run, dataset, tmp_path: Path) -> None:
    out = tmp_path / "stats"
    code, text = run("stats", dataset.directory, "--length", 400, "--num-patches", 300, "--out", out)
    assert code == 0 and "In rows of T = 400 tokens" in text
    assert {p.name for p in out.iterdir()} == {"stats.png", "stats.html", "stats.json"}
    page = (out / "stats.html").read_text()
    assert page.count("data:image/png;base64,") == 2  # for light and dark screens
    assert not re.search(r'(src|href|srcset)="(?!data:)', page), "the page fetches something"


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (("--records", 0, 3), ["r000", "r003"]),
        (("--ids", "r005"), ["r005"]),
        (("--records", 2, "--ids", "r005", "r001"), ["r002", "r005", "r001"]),
        (("--sample", 2, "--seed", 1), None),
    ],
)
def test_show_chooses_records(run, dataset, tmp_path: Path, arguments, shown) -> None:
    code, text = run("show", dataset.directory, *arguments, "--out", tmp_path / "show.html")
    assert code == 0 and "wrote " in text
    titles = re.findall("<h2>(r.*)</h2>", (tmp_path / "show.html").read_text())
    assert titles == shown if shown else len(titles) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--records", "99"), "--records 99: .*set has records 0 to 23"),
        (("--ids", "nobody"), "--ids nobody: .* has no such record"),
        (("--sample", "0"), "--sample must be 1 or more"),
        (("--plan", "nowhere"), "no plan at nowhere"),
        (("--plan", "nowhere", "--ids", "r001"), "--plan shows rows"),
    ],
)
def test_show_rejects_wrong_arguments(run, dataset, tmp_path: Path, arguments, message: str) -> None:
    code, text = run("show", dataset.directory, *arguments, "--out", tmp_path / "x.html")
    assert code == 1 and not (tmp_path / "x.html").exists()
    assert re.search(message, text), text
    assert "Traceback" not in text


def test_show_writes_html_only(run, dataset, tmp_path: Path) -> None:
    code, text = run("show", dataset.directory, "--out", tmp_path / "x.png")
    assert code == 1 and "ends in .html" in text


def test_show_with_another_strategy(run, dataset, tmp_path: Path) -> None:
    page = tmp_path / "show.html"
    code, text = run("show", dataset.directory, "--records", 2, "--strategy", "dynamic_s2", "--out", page)
    shown = page.read_text()
    assert code == 0 and "144 tokens, 3,456 patches in 6 tiles" in shown and "384×384" in shown, text
    code, text = run("show", dataset.directory, "--strategy", "dynamic", "--out", page)
    assert code == 1 and "did you mean 'dynamic_s2'" in text


def test_show_rows_of_a_plan(run, dataset, processor, tmp_path: Path) -> None:
    # The command's processor has the released patch settings, hence a plan of its own.
    plan = ("plan", dataset.directory, "--out", tmp_path / "plan", "--length", 800, "--num-patches", 700)
    assert run(*plan)[0] == 0
    page = tmp_path / "rows.html"
    code, text = run("show", dataset.directory, "--plan", tmp_path / "plan", "--rows", 0, "--out", page)
    assert code == 0 and "<h2>row 0</h2>" in page.read_text(), text
    code, text = run("show", dataset.directory, "--plan", tmp_path / "plan", "--rows", 99, "--out", page)
    assert code == 1 and "plan has rows 0 to" in text
    other = write_dataset(tmp_path / "other", mixed_records(6), processor)
    code, text = run("show", other.directory, "--plan", tmp_path / "plan", "--out", page)
    assert code == 1 and "was made from set: name these" in text


def test_show_needs_the_tokenizer_of_the_import(run, dataset, processor, tmp_path: Path) -> None:
    other = write_dataset(tmp_path / "other", mixed_records(6), processor)
    manifest = other.directory / "manifest.json"
    manifest.write_text(manifest.read_text().replace(processor.text_fingerprint, "0" * 64))
    code, text = run("show", other.directory, "--out", tmp_path / "x.html")
    assert code == 1 and "another tokenizer or chat template" in text and "or name the checkpoint" in text
    assert run("stats", other.directory)[0] == 0  # numbers need no tokenizer
    assert run("show", dataset.directory, other.directory, "--out", tmp_path / "x.html")[0] == 1


def test_ids_and_directories_are_text_everywhere(run, processor, tmp_path: Path) -> None:
    """Markup of rich, formulas of matplotlib, HTML, and escape sequences of terminals."""
    odd = ["[/b]", "[red]x", "\x1b]0;title\x07", "\x1b[2J", "<script>x</script>", "$\\frac{$", "a\u202eb"]
    records = [make_record(i, id=f"{text}{i}", task=f"[b]{i % 2}$_{{$", source=text) for i, text in enumerate(odd)]
    directory = write_dataset(tmp_path / "a$\\frac{$b [red]", records, processor).directory
    other = write_dataset(tmp_path / "plain", records, processor).directory
    (directory / "records-00000-000.array_record").write_bytes(b"")
    commands = [
        ("show", other, "--out", tmp_path / "show.html", "--ids", *(record.id for record in records)),
        ("validate", directory, "--workers", 0),
        ("plan", other, "--out", tmp_path / "plan$\\frac{$", "--length", 264),
    ]
    copy = Path(shutil.copytree(other, tmp_path / "c$\\frac{$b [red]"))
    commands.append(("stats", copy, "--length", 8, "--out", tmp_path / "more"))
    for command in commands:
        code, text = run(*command)
        assert code == (command[0] == "validate"), text
        assert not {"\x1b", "\x07", "\u202e"} & {*text} and "Traceback" not in text
    for page in ("show.html", "more/stats.html"):
        assert "<script>" not in (tmp_path / page).read_text()
    _, text = run("stats", other, "--length", 8)
    assert all(shown in text for shown in (r"\x1b[2J3", "<script>x</script>4", "$\\frac{$5", r"a\u202eb6", "[b]1$_{$"))
