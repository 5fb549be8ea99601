"""The command ``phivision`` without a subcommand."""

from __future__ import annotations

from importlib.metadata import version

import pytest

from phivision_jax.cli.main import COMMANDS, main


def test_help_says_what_the_program_is(capsys):
    main(["--help"])
    text = capsys.readouterr().out
    assert "\nTrain, fine-tune, convert and run Phi-4-reasoning-vision-15B in JAX.\n" in text
    assert all(f"\n  {name} " in text for name in COMMANDS) and "exit codes: 0 done" in text
    assert max(map(len, text.splitlines())) <= 120


def test_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"phivision_jax {version('phivision_jax')}, jax {version('jax')}\n"


@pytest.mark.parametrize("words", [["--versoin"], ["trian"]])
def test_unknown_command_exits_with_2(words, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(words)
    assert exit_.value.code == 2 and words[0] in capsys.readouterr().err
