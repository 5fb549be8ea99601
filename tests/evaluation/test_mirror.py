"""An evaluation in a bucket continues on another machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from phivision_jax.cli.main import main
from phivision_jax.evaluation.results import load_results
from phivision_jax.io import storage
from tests.support.answers import serve_answers
from tests.support.paths import ROOT
from tests.support.sums_benchmark import write_sums

SUMS = ROOT / "tests" / "support" / "sums_benchmark.py"


@pytest.fixture
def command(tmp_path):
    write_sums(tmp_path / "sums.json", 12)
    return ["eval", "--model=m", f"--benchmarks={SUMS}", f"--benchmark-data={tmp_path}/sums.json", "--no-cache"]


def machine(monkeypatch, path: Path) -> None:
    monkeypatch.setenv("PHIVISION_SCRATCH", str(path))


def test_evaluation_in_a_bucket(bucket, command, tmp_path, monkeypatch):
    with serve_answers() as (url, received):
        command += [f"--endpoint={url}", f"--out={bucket}"]
        machine(monkeypatch, tmp_path / "one")
        main([*command, "--shard=0/2"])
        assert (
            len(received) == 6
            and {"run.json", "results-0.jsonl", "report.md"} <= storage.files(place := storage.location(bucket)).keys()
        )
        machine(monkeypatch, tmp_path / "two")
        main([*command, "--shard=1/2"])
        main([*command, "--shard=1/2"])
        assert len(received) == 12 and len(load_results(place)[1]) == 12
        assert json.loads((place / "report.json").read_text())["summaries"][0]["items"] == 12
        machine(monkeypatch, tmp_path / "three")
        main([*command, "--shard=0/2"])
        assert len(received) == 12
        main([*command, "--restart"])
        assert len(received) == 24 and len(load_results(place)[1]) == 12


def test_what_is_left_on_disk_of_another_evaluation_is_not_used(bucket, command, tmp_path, monkeypatch):
    machine(monkeypatch, tmp_path / "one")
    with serve_answers() as (url, received):
        command += [f"--endpoint={url}", f"--out={bucket}"]
        main(command)
        storage.remove(storage.location(bucket))
        main(command)
        assert len(received) == 24 and len(load_results(storage.location(bucket))[1]) == 12
