"""Import boundaries between the rooms of the package: the table of house rules, enforced by reading the imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

import phivision_jax
from tests.support.paths import ROOT

PACKAGE = ROOT / "phivision_jax"

HOST = {"config", "io", "images", "text"}
"""Rooms that any host code may use."""
DATA = {*HOST, "rows", "processor", "data"}
DEVICE = {"config", "batch", "sharding"}
CHECKPOINT_FORMAT = {"checkpoint.layout", "checkpoint.checksums"}
"""The layout of a checkpoint, and its checksums in NumPy: no JAX, so that converters may use them."""

# Room → rooms that it may import, at module level or inside a function. A room may always import itself.
MAY_IMPORT: dict[str, set[str]] = {
    "config": {"io"},
    "io": set(),
    "text": {"config", "images", "io"},
    "images": {"config", "io"},
    "rows": {*HOST, "batch"},
    "batch": {"config"},
    "processor": {*HOST, "rows", "batch"},
    "sharding": {"config", "batch"},
    "models.remat": set(),
    "models.attention": {*DEVICE, "models.remat"},
    "models": {*DEVICE, "models.remat", "models.attention"},
    "data": {*HOST},
    "data.sources": {*HOST, "data"},
    "data.store": {*DATA, "data.sources"},
    "data.plan": {*DATA, "batch", "data.store"},
    "data.feed": {*DATA, "batch", "data.store", "data.plan"},
    "data.view": {*DATA, "batch", "data.store", "data.plan", "data.feed", "inference.grounding"},
    "checkpoint.checksums": {"checkpoint.layout"},
    "checkpoint.layout": {"config", "io"},
    "convert": {"config", "io", *CHECKPOINT_FORMAT},
    "checkpoint": {*DEVICE, *CHECKPOINT_FORMAT, "models", "processor", "io", "convert", "distributed"},
    "hardware": {"config", "models.remat"},
    "distributed": {"io"},
    "inference.grounding": {"images"},
    "inference": {*DEVICE, *HOST, "rows", "processor", "models", "models.attention", "inference.grounding"},
    "serving": {*HOST, "inference"},
    "evaluation.scoring": set(),
    "evaluation": {
        *DEVICE,
        *DATA,
        *("data.sources", "data.store", "models", "inference", "inference.grounding", "evaluation.scoring"),
    },
    "training": {
        *DEVICE,
        *DATA,
        *CHECKPOINT_FORMAT,
        *("data.sources", "data.store", "data.plan", "data.feed", "models", "models.remat", "checkpoint", "convert"),
        *("hardware", "distributed", "inference", "evaluation"),
    },
    "vllm_plugin": set(),
    "preflight": {*DEVICE, *HOST, "rows", "models", "models.remat", "hardware", "training", "inference"},
}
FREE = {"cli", "phivision_jax"}
"""The command line and the package's own names import what they need, lazily."""
WITHOUT_JAX = [
    *("text", "images", "rows", "io", "data.sources", "data.store", "convert", "inference.grounding"),
    "evaluation.scoring",
    *sorted(CHECKPOINT_FORMAT),
]


def modules() -> dict[str, Path]:
    """Dotted names below the package → files."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def room_of(module: str) -> str:
    """The innermost room that holds a module."""
    parts = module.split(".")
    prefixes = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((p for p in prefixes if p in MAY_IMPORT or p in FREE), "phivision_jax" if module == "" else parts[0])


def imported(path: Path, known: set[str]) -> Iterator[tuple[int, str]]:
    """(line, module below the package) of every import of ours in a file, wherever it is written."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "phivision_jax":
            base = node.module.removeprefix("phivision_jax").lstrip(".")
            for alias in node.names:
                name = f"{base}.{alias.name}".lstrip(".")
                yield node.lineno, name if name in known else base
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "phivision_jax":
                    yield node.lineno, alias.name.removeprefix("phivision_jax").lstrip(".")


def violations(found: dict[str, Path]) -> list[str]:
    """One sentence for each import that crosses a boundary."""
    sentences = []
    for module, path in found.items():
        room = room_of(module)
        if room in FREE:
            continue
        for line, target in imported(path, set(found)):
            other = room_of(target)
            if target and other != room and other not in MAY_IMPORT[room]:
                where = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
                sentences.append(f"{where}:{line}: {room} may not import {other} ({target})")
    return sentences


def test_every_module_is_in_a_room():
    unknown = {room for module in modules() if (room := room_of(module)) not in {*MAY_IMPORT, *FREE}}
    assert not unknown


def test_imports_stay_inside_the_table():
    assert violations(modules()) == []


@pytest.mark.parametrize(
    "module, line",
    [
        ("models.layers", "from phivision_jax.training.step import TrainStep"),
        ("io.progress", "def bar():\n    from phivision_jax.data.records import Record"),
        ("data.sources.parquet", "import phivision_jax.data.store.dataset"),
        ("checkpoint.layout", "from phivision_jax.checkpoint import manager"),
    ],
)
def test_upward_import_is_found(module, line, tmp_path):
    planted = tmp_path / "planted.py"
    planted.write_text(line)
    assert len(violations(modules() | {module: planted})) == 1


def test_table_has_no_circle():
    """Rooms can be ordered so that each imports only rooms before it."""
    left = dict(MAY_IMPORT)
    while left:
        ready = [room for room, may in left.items() if not may & left.keys()]
        assert ready, f"a circle among {sorted(left)}"
        for room in ready:
            del left[room]


@pytest.mark.parametrize("room", WITHOUT_JAX)
def test_host_room_imports_without_jax(room):
    """In a fresh process, importing all modules of a host room leaves JAX out of sys.modules."""
    names = [f"phivision_jax.{m}".rstrip(".") for m in modules() if m == room or m.startswith(f"{room}.")]
    assert names
    code = f"import importlib, sys; [importlib.import_module(n) for n in {names}]; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_names_of_the_package_can_be_imported(tiny):
    assert all(callable(getattr(phivision_jax, name)) for name in phivision_jax.__all__)
    graphdef, params = tiny.split()
    again = phivision_jax.merge(graphdef, params).split()[1]
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, again, params))


def test_package_offers_its_names_without_importing_them():
    code = "import sys, phivision_jax as p; print(sorted(set(p.__all__) - set(dir(p))), 'jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] False"
