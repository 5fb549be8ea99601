"""Trainings as real processes, for tests: ``stand_in.py`` under the launcher."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.support.paths import ROOT, SUPPORT

STAND_IN = SUPPORT / "stand_in.py"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
PATIENCE_S = 120.0


def stand_in(run: Path, *words: object) -> list[str]:
    return [sys.executable, str(STAND_IN), f"--run={run}", *map(str, words)]


class Launched:
    """A command under the launcher; ``output`` is what launcher and processes have printed so far."""

    def __init__(self, command: list[str], log: Path, processes: int = 2, restarts: int = 0) -> None:
        words = [
            sys.executable,
            "-m",
            "phivision_jax.distributed.launch",
            f"--processes={processes}",
            f"--restarts={restarts}",
        ]
        self.log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [*words, "--", *command], cwd=ROOT, env=ENVIRONMENT, stdout=file, stderr=file
            )

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def pids(self) -> list[int]:
        """Of the newest start."""
        starts = re.findall("launch: started .*", self.output)
        return [int(pid) for pid in re.findall(r"pid (\d+)", starts[-1])] if starts else []

    def until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline and self.process.poll() is None, self.output
            time.sleep(0.02)

    def finish(self) -> int:
        """The launcher's exit code."""
        try:
            return self.process.wait(PATIENCE_S)
        finally:
            self.process.kill()
