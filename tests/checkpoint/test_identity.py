"""The identity of weights, for caches of replies."""

from __future__ import annotations

import os
import shutil

import pytest

from phivision_jax.checkpoint.identity import fingerprint
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


def test_hugging_face_directory(tmp_path):
    """Small files count by content, files of weights by size and time."""
    (tmp_path / "config.json").write_text('{"model_type": "phi4"}')
    (weights := tmp_path / "model.safetensors").write_bytes(bytes(2 << 20))
    found = [fingerprint(tmp_path)]
    assert fingerprint(tmp_path) == found[0]
    os.utime(weights, (1, 1))
    found.append(fingerprint(tmp_path))
    weights.write_bytes(bytes(3 << 20))
    os.utime(weights, (1, 1))
    found.append(fingerprint(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "phi5"}')
    assert len({*found, fingerprint(tmp_path)}) == 4
