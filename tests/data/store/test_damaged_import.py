"""One record in ten is damaged, in every known way: each is listed once, and all others are trained on."""

from __future__ import annotations

import collections
import json
import subprocess
import sys

import pytest

from phivision_jax.batch import RowShape
from phivision_jax.data import quarantine
from phivision_jax.data.feed.pipeline import batches
from phivision_jax.data.plan.mixture import Mixture
from phivision_jax.data.plan.plan import make_plan
from phivision_jax.data.store.dataset import Dataset
from tests.support.damaged_sources import KINDS, make
from tests.support.paths import ROOT


@pytest.mark.parametrize("records", [600, pytest.param(50_000, marks=pytest.mark.slow)])
def test_damaged_source_loses_only_bad_records(tmp_path, processor, records):
    damaged = make(tmp_path / "raw", records, records // 10, seed=records)
    assert set(damaged.values()) == set(KINDS)
    words = [tmp_path / "raw/data.jsonl", tmp_path / "set", "--images", tmp_path / "raw/images", "--max-bad", "0.2"]
    done = subprocess.run(
        [sys.executable, "-m", "phivision_jax.cli", "data", "import", *map(str, words)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    dataset = Dataset.open(tmp_path / "set")

    plan = make_plan([dataset], Mixture.from_directories("set"), processor, RowShape(512, 1, 256), batch_rows=8)
    assert not len(plan.rejected)
    log = quarantine.RunLog(tmp_path / "run.jsonl", 0.2)
    seen: collections.Counter[str] = collections.Counter()
    for _, info in batches([dataset], plan, processor, batch_rows=8):
        log.add(info.failed, sum(map(len, info.record_ids)))
        seen.update(record_id for row in info.record_ids for record_id in row)
        seen.subtract(bad.id for bad in info.failed)

    named = [
        json.loads(line)
        for file in (tmp_path / "set" / quarantine.FILE, tmp_path / "run.jsonl")
        for line in file.read_text(encoding="utf-8").splitlines()
    ]
    assert sorted(bad["id"] for bad in named) == sorted(damaged)
    assert all(bad["source"] == "data" and bad["detail"] and bad["where"] for bad in named)
    good = {f"r{i:06d}" for i in range(records)} - set(damaged)
    assert {record_id for record_id, count in seen.items() if count} == good and set(seen.values()) <= {0, 1}
    # Damage that no header shows is left to training.
    at_training = {damaged[json.loads(line)["id"]] for line in (tmp_path / "run.jsonl").read_text().splitlines()}
    assert at_training <= {"truncated_jpeg", "truncated_png", "corrupt_jpeg", "corrupt_png"}
