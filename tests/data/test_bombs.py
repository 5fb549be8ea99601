"""Imports of everything that is small on disk and large in memory."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

IMPORT = """
import json, sys, time
from pathlib import Path
from phivision_jax.cli.data import processor_for
from phivision_jax.data.sources.item_options import ItemOptions
from phivision_jax.data.sources.open_source import open_source
from phivision_jax.data.store.importing import import_source

if __name__ == "__main__":
    folder, kind = Path(sys.argv[1]), sys.argv[2]
    source = open_source(folder / kind, options=ItemOptions(images=folder / "images"))
    dataset = import_source(source, folder / f"out-{kind}", processor_for(None), workers=0, decode=True, max_bad=1)
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    peak = int(status["VmHWM"].split()[0]) * 1024
    print("\\n" + json.dumps([peak, time.process_time(), len(source), [record.id for record in dataset]]))
"""

GOOD = {"lines": 54, "array": 12, "parquet": 6, "payloads": 6}
"""Good records; each lines up with a bomb."""


@pytest.mark.slow
def test_import_of_bombs_keeps_good_records(tmp_path):
    """Each in at most 1.5 GB, parquet 1 GB, and one minute of a processor's time."""
    run = {"cwd": ROOT, "capture_output": True, "text": True}
    builder = subprocess.run([sys.executable, "-m", "tests.support.bombs", str(tmp_path / "bombs")], **run)
    assert builder.returncode == 0, builder.stderr
    for kind in ("lines", "array", "parquet", "payloads"):
        done = subprocess.run([sys.executable, "-c", IMPORT, str(tmp_path / "bombs"), kind], **run)
        assert done.returncode == 0, done.stderr
        assert "Warning" not in done.stderr and "Traceback" not in done.stderr
        peak, took, count, kept = json.loads(done.stdout.splitlines()[-1])
        lines = (tmp_path / "bombs" / f"out-{kind}" / "quarantine.jsonl").read_text().splitlines()
        bad = [json.loads(line) for line in lines]
        assert len(kept) + len(bad) == count
        good = [id for id in kept if id.startswith("good")]
        assert not [one for one in bad if one["id"].startswith("good")] and len(good) == GOOD[kind], bad
        assert not [id for id in kept if id.startswith("bomb")], "no bomb is imported"
        assert peak <= (1e9 if kind == "parquet" else 1.5e9), f"{kind}: {peak:,} bytes"
        assert took <= 60, f"{kind}: {took:.0f} s"
