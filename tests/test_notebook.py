"""The notebook runs from a fresh process on any checkpoint, and is committed with the outputs of its cells."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from tests.support.notebook import Cell, run
from tests.support.paths import ROOT
from tests.support.small_model import write_small_model

PATH = ROOT / "notebooks" / "ask.ipynb"
CHECKPOINT = 'CHECKPOINT, MESH = "../runs/tiny", {"data": 1}'


def code_cells():
    return [cell for cell in json.loads(PATH.read_text())["cells"] if cell["cell_type"] == "code"]


def test_committed_outputs_are_complete_and_small():
    cells = code_cells()
    silent = [i for i, cell in enumerate(cells) if not cell["outputs"]]
    assert silent == [0]  # settings
    assert PATH.stat().st_size < 1_000_000
    kinds = {kind for cell in cells for output in cell["outputs"] for kind in output.get("data", ["stdout"])}
    assert {"text/html", "image/png", "stdout"} <= kinds
    assert not re.search(r"(?:/home/|/root|/tmp|/work)", json.dumps([cell["outputs"] for cell in cells]))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ['{"data": 1}', '{"tensor": 2}'])
def test_notebook_runs_on_another_checkpoint(tmp_path, mesh):
    """One line is changed; the process sees eight devices because the notebook asks for them."""
    checkpoint = write_small_model(tmp_path / "model")
    changed = f'CHECKPOINT, MESH = "{checkpoint}", {mesh}'
    words = [sys.executable, "-m", "tests.support.notebook", str(PATH), CHECKPOINT, changed]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(words, cwd=PATH.parent, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


def test_runner_collects_outputs_as_jupyter_does():
    cell, names = Cell(), {}
    cell.run("print('a')\ndisplay(1)\nx = 2\nprint('b')\nx", names)
    assert [output["output_type"] for output in cell.outputs] == ["stream", "display_data", "stream", "execute_result"]
    assert cell.outputs[-1]["data"] == {"text/plain": ["2"]} and names["x"] == 2
    empty = Cell()
    empty.run("None\n", names)
    assert empty.outputs == []


def test_runner_names_the_cell_that_fails():
    notebook = {"cells": [{"cell_type": "markdown", "source": ["text"]}, {"cell_type": "code", "source": ["1 / 0"]}]}
    with pytest.raises(RuntimeError, match="cell 2 failed with ZeroDivisionError"):
        run(notebook)
    notebook["cells"][1]["source"] = ["x = 1"]
    with pytest.raises(RuntimeError, match="not in the notebook"):
        run(notebook, (("y = 1", "y = 2"),))
