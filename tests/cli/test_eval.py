"""Settings of ``phivision eval`` and ``phivision chat``, without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import phivision_jax
from phivision_jax.cli.main import main
from phivision_jax.data.store.dataset import Dataset
from phivision_jax.evaluation import runner


class Stop(Exception):
    pass


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Record what ``load``, the evaluator and ``generate`` receive; the last two then stop the command."""
    received: dict[str, Any] = {}

    def load(checkpoint: str, **settings: Any) -> tuple[None, None]:
        received.update(settings)
        return None, None

    def stop(*arguments: Any, **settings: Any) -> None:
        received.update(settings)
        raise Stop

    monkeypatch.setattr(phivision_jax, "load", load, raising=False)
    monkeypatch.setattr(phivision_jax, "generate", stop, raising=False)
    monkeypatch.setattr(runner, "Evaluator", stop)
    monkeypatch.setattr(Dataset, "open", lambda path: None)
    return received


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], {"max_new_tokens": 4096, "rows": 8, "mesh": {}}),
        (["--config=configs/tiny.py"], {"max_new_tokens": 8, "rows": 64, "mesh": {}}),
        (["--max-new-tokens=3", "--batch=2"], {"max_new_tokens": 3, "rows": 2}),
        (["--mesh", "fsdp", "4", "tensor", "2"], {"mesh": {"fsdp": 4, "tensor": 2}, "weights": None}),
        (["--weights", "int8"], {"weights": "int8"}),
    ],
)
def test_eval_settings(received: dict[str, Any], words: list[str], expected: dict[str, Any]) -> None:
    with pytest.raises(Stop):
        main(["eval", "--checkpoint=run", "--data=set", *words])
    assert expected.items() <= received.items()


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
