from __future__ import annotations

from collections.abc import Callable

import pytest

from phivision_jax.cli.convert import main


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
