"""The identity of weights, for caches of replies."""

from __future__ import annotations

import os
import shutil

import pytest

from phivision_jax.checkpoint.identity import fingerprint
from phivision_jax.cli.main import main
from tests.support.checkpoints import edit_meta
from tests.support.small_model import write_small_model


@pytest.fixture
def checkpoint(tmp_path):
    return write_small_model(tmp_path / "model")


def test_copies_are_the_same_and_other_weights_are_not(checkpoint, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    assert fingerprint(copy) == fingerprint(checkpoint)
    edit_meta(copy, step=7)
    assert fingerprint(copy) != fingerprint(checkpoint)


def test_hugging_face_directory(checkpoint, tmp_path):
    main(["convert", "to-hf", str(checkpoint), str(hf := tmp_path / "hf")])
    before = fingerprint(hf)
    assert fingerprint(hf) == before
    config = (hf / "config.json").read_text()
    (hf / "config.json").write_text(config + " ")
    assert fingerprint(hf) != before
    (hf / "config.json").write_text(config)
    (hf / "model-large.safetensors").write_bytes(bytes(2 << 20))
    large = fingerprint(hf)
    os.utime(hf / "model-large.safetensors", (1, 1))
    assert len({before, large, fingerprint(hf)}) == 3
