"""Commands that tests run in this process, and their results: (exit code, everything printed)."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from phivision_jax.cli.main import main

type Result = tuple[int, str]
type Run = Callable[..., Result]


def run_command(capsys: pytest.CaptureFixture[str], *words: str) -> Result:
    """Run a subcommand of ``phivision``."""
    code = 0
    try:
        main(words)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def succeeded(result: Result) -> str:
    """The output of a command that must have exited with 0."""
    code, text = result
    assert code == 0, text
    return text


def refused(result: Result, *fragments: str, code: int = 2) -> None:
    """Check that a command failed with one short line that contains these fragments."""
    found, text = result
    assert found == code and "phivision: " in text, text
    error = text[text.index("phivision: ") :]
    assert error.count("\n") == 1 and len(error) < 600 and "Traceback" not in text, text
    assert all(fragment in error for fragment in fragments), text
