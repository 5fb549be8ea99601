from __future__ import annotations

import pytest

from phivision_jax.evaluation.benchmarks import registry
from tests.support.paths import ROOT

OWN = """
from phivision_jax.evaluation.benchmark import Benchmark, Item
from phivision_jax.evaluation.scoring import Score

class Mine(Benchmark):
    name, title = "mine", "Mine"

    def items(self, path):
        return [Item("1", "What?", (), {})]

    def score(self, prediction, item):
        return Score(1.0, prediction, "")
"""


@pytest.mark.parametrize("name", registry.NAMES)
def test_registered_benchmark_has_its_name(name):
    benchmark = registry.find(name)
    assert benchmark.name == name and benchmark.title
    assert benchmark.download.count("/") == 1 or benchmark.download.startswith("https://")


def test_unknown_name_gets_the_nearest():
    with pytest.raises(ValueError, match="there is no benchmark 'mathvist'; did you mean 'mathvista'"):
        registry.find("mathvist")


def test_own_file(tmp_path):
    (tmp_path / "mine.py").write_text(OWN)
    assert registry.find(str(tmp_path / "mine.py")).items("")[0].id == "1"


@pytest.mark.parametrize(
    "text, problem",
    [
        ("x = 1", "must define one subclass of Benchmark; it defines none"),
        (OWN + OWN.replace("Mine", "Other"), "it defines Mine, Other"),
        (OWN.replace("def score", "def other"), "Mine has no score"),
        (OWN.replace("name, title =", "x, title ="), "Mine has no name"),
        ("1 / 0", "cannot be run: ZeroDivisionError"),
        ("def", "cannot be run: SyntaxError"),
    ],
)
def test_unsuitable_file(tmp_path, text, problem):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ValueError, match=rf"mine\.py.*{problem}"):
        registry.find(str(tmp_path / "mine.py"))


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        registry.find(str(tmp_path / "mine.py"))


def test_easy_vqa_example_has_all_questions():
    path = ROOT / "examples" / "easy_vqa.py"
    assert len(path.read_text().splitlines()) < 50
    benchmark = registry.find(str(path))
    items = benchmark.items("")
    assert len(items) == len({item.id for item in items}) == 9_673
    assert len({item.cluster for item in items}) == 1_000
    assert all(item.question.startswith("<image>\n") and len(item.images) == 1 for item in items)
    assert benchmark.score(f"{items[0].record['answer']}.", items[0]).value == 1
    assert benchmark.score("a dragon", items[0]).value == 0


def test_documentation_has_the_data_and_figures_of_every_benchmark():
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    for name in registry.NAMES:
        benchmark = registry.find(name)
        (line,) = [line for line in page.splitlines() if line.startswith(f"| `{name}` |") and line.count("|") == 8]
        assert benchmark.download.removeprefix("https://") in line
        figures = [*filter(None, [benchmark.published]), *benchmark.published_groups.values()]
        assert all(str(figure.value) in line for figure in figures) and (figures or line.count("–") >= 3)
        assert ("–" not in line.split("|")[5]) == benchmark.judged
