"""Benchmarks that tests run as processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.launched import ENVIRONMENT, ROOT


def run_benchmark(name: str, folder: Path, *words: str) -> dict[str, Any]:
    """Run a script of ``benchmarks/`` in a folder; the results that it has written."""
    out = folder / "results.json"
    command = [sys.executable, str(ROOT / "benchmarks" / name), *words, f"--work={folder / 'work'}", f"--out={out}"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())
