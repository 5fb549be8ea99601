from __future__ import annotations

from pathlib import Path

import pytest

from phivision_jax.cli.main import main
from phivision_jax.io import atomic
from tests.support.commands import Result, Run
from tests.support.released_layout import write_small


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """``phivision convert …`` in this process."""

    def run(*argv: object) -> Result:
        code = 0
        try:
            main(["convert", *map(str, argv)])
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the flush to disk, which takes most of the time of a small conversion."""
    monkeypatch.setattr(atomic, "sync_tree", lambda directory: None)


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    """A small Hugging Face directory in three shards."""
    return write_small(tmp_path / "hf")
