"""Small sets of all published benchmarks through ``phivision eval``, with a model of a few thousand weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from phivision_jax.cli.main import main
from phivision_jax.evaluation.benchmarks import registry
from phivision_jax.evaluation.results import load_results
from tests.support.benchmark_sets_of_questions import SETS
from tests.support.small_model import write_small_model

MODES = ("auto", "think", "nothink")


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    """A folder with a set of every benchmark, in its first form."""
    folder = tmp_path_factory.mktemp("sets")
    for (name, _), write in reversed(SETS.items()):
        if not (folder / name).exists():
            (folder / name).mkdir()
            write(folder / name)
    return folder


def test_every_benchmark_in_every_mode(sets, tmp_path, capsys):
    model, out = write_small_model(tmp_path / "model"), tmp_path / "out"
    main([
        "eval", str(model), f"--benchmarks={','.join(registry.NAMES)}", f"--benchmark-data={sets}", f"--out={out}",
        f"--modes={','.join(MODES)}", "--max-new-tokens=4", "--slots=16", "--no-cache",
    ])  # fmt: skip
    _, results = load_results(out)
    assert {(result.benchmark, result.mode) for result in results} == {(n, m) for n in registry.NAMES for m in MODES}
    assert len(results) > 5 * len(registry.NAMES) * len(MODES) and not any(result.error for result in results)
    assert all(0 < result.output_tokens <= 4 and result.image_tokens for result in results)
    forced = [result for result in results if result.mode != "auto"]
    assert all(result.taken == result.mode for result in forced)
    summaries = json.loads((out / "report.json").read_text())["summaries"]
    assert len(summaries) == len(registry.NAMES) * len(MODES)
    table = (out / "report.md").read_text()
    assert all(registry.find(name).title.replace("*", r"\*") in table for name in registry.NAMES)
    assert "Traceback" not in capsys.readouterr().out
