"""Metadata of the wheel: its description on an index page, and the marker of type annotations."""

from __future__ import annotations

import ast
import re
import tomllib

import pytest

from hatch_build import index_page
from tests.support.paths import ROOT


def test_index_page_has_no_links_to_files():
    page = index_page((ROOT / "README.md").read_text())
    assert re.findall(r"\]\((?!https://)[^)]*\)", page) == [] and "<!--" not in page
    assert "docs/data.md" in page and "(https://arxiv.org/abs/2603.03975)" in page


@pytest.mark.parametrize(
    ("readme", "expected"),
    [
        ("see [docs/a.md](docs/a.md).", "see docs/a.md."),
        ("see [the table](docs/a.md#part).", "see the table (docs/a.md)."),
        ("see [below](#part).", "see below."),
        ("see [it](https://x.org/a#b).", "see [it](https://x.org/a#b)."),
        ("a\n\n![An image](docs/a.png)\n\nb", "a\n\nb"),
        ("![An image](https://x.org/a.png)", "![An image](https://x.org/a.png)"),
    ],
)
def test_index_page_by_hand(readme, expected):
    assert index_page(readme) == expected


def test_every_file_that_the_readme_links_exists():
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / "README.md").read_text())
    assert len(links) > 10 and all((ROOT / link).exists() for link in links), links


def test_package_is_typed_and_described():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (ROOT / "phivision_jax/py.typed").exists() and "Typing :: Typed" in project["classifiers"]
    assert {"Paper", "Weights"} <= project["urls"].keys() and "readme" in project["dynamic"]


def test_plugin_of_vllm_is_an_entry_point():
    """vLLM is not installed here (``benchmarks/vllm_ids.py`` runs it), so the plugin is read instead of imported."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, function = project["entry-points"]["vllm.general_plugins"]["phivision_jax"].split(":")
    plugin = ast.parse((ROOT / module.replace(".", "/") / "__init__.py").read_text())
    defined = {node.name: node for node in plugin.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert isinstance(defined[function], ast.FunctionDef)
    (by_name,) = re.findall(r"__name__}\.(\w+):(\w+)", ast.unparse(defined[function]))
    model = ast.parse((ROOT / module.replace(".", "/") / f"{by_name[0]}.py").read_text())
    assert by_name[1] in {node.name for node in model.body if isinstance(node, ast.ClassDef)}
