"""A command under a launcher, in real processes; ``stand_in.py`` is a small one."""

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


def under_launcher(command: list[str], processes: int, restarts: int = 10) -> list[str]:
    """The command as one process under the package's launcher, or as several under ``launch_many``."""
    module = "phivision_jax.distributed.launch" if processes == 1 else "tests.support.launch_many"
    many = [] if processes == 1 else [f"--processes={processes}"]
    return [sys.executable, "-m", module, *many, f"--restarts={restarts}", "--", *command]


class Launched:
    """A command under a launcher; ``output`` is what launcher and processes have printed so far."""

    def __init__(self, command: list[str], log: Path, processes: int = 2, restarts: int = 0) -> None:
        self.log = log
        words = under_launcher(command, processes, restarts)
        with log.open("wb") as file:
            self.process = subprocess.Popen(words, cwd=ROOT, env=ENVIRONMENT, stdout=file, stderr=file)

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def pids(self) -> list[int]:
        """Process ids of the newest start."""
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
