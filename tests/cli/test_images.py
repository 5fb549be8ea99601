"""Tests of ``phivision images compare``."""

from __future__ import annotations

import pytest
from PIL import Image

from phivision_jax.cli.main import main


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.effect_noise((640, 480), 50).save(path)
    return path


def test_compare_writes_figure_and_prints_numbers(photo, capsys, monkeypatch):
    monkeypatch.chdir(photo.parent)
    main(["images", "compare", str(photo), "--strategies", "naflex:2048", "dynamic_s2"])
    text = " ".join(capsys.readouterr().out.split())  # lines are wrapped
    assert "640×480 pixels" in text and "768×768" in text and "wrote photo-strategies.png" in text
    with Image.open(photo.parent / "photo-strategies.png") as figure:
        assert figure.width > 1000


@pytest.mark.parametrize(
    "arguments, problem",
    [
        (("--strategies", "dynamic"), "image_layout 'dynamic' is not registered"),
        (("--patch-size", "14"), "set tile_size=378"),
        (("--out", "x.html"), "ends in .png"),
    ],
)
def test_compare_refuses(photo, capsys, arguments, problem):
    with pytest.raises(SystemExit):
        main(["images", "compare", str(photo), *arguments])
    assert problem in capsys.readouterr().err
