from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# Tests of this folder share helpers; with import mode importlib a folder is not on the path by itself.
sys.path.insert(0, str(Path(__file__).parent))

from convert.cli import main


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """``python -m convert …`` in this process: (exit code, everything it printed)."""

    def run(*argv: object) -> tuple[int, str]:
        code = 0
        try:
            main([str(arg) for arg in argv])
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run
