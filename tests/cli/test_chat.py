"""Settings of ``phivision chat``, without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import phivision_jax
from phivision_jax.cli.main import main


class Stop(Exception):
    pass


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Record what ``load`` and ``generate`` receive; the latter then stops the command."""
    received: dict[str, Any] = {}

    def load(checkpoint: str, **settings: Any) -> tuple[None, None]:
        received.update(settings)
        return None, None

    def stop(*arguments: Any, **settings: Any) -> None:
        received.update(settings)
        raise Stop

    monkeypatch.setattr(phivision_jax, "load", load, raising=False)
    monkeypatch.setattr(phivision_jax, "generate", stop, raising=False)
    return received


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], {"max_new_tokens": None, "mesh": {}}),
        (["--max-new-tokens=3", "--mesh", "data", "1"], {"max_new_tokens": 3, "mesh": {"data": 1}}),
        (["--weights=int8"], {"weights": "int8"}),
    ],
)
def test_chat_settings(received: dict[str, Any], words: list[str], expected: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(Stop):
        main(["chat", "run", "what?", *words])
    assert expected.items() <= received.items()
