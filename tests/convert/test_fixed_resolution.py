"""Models with a fixed-resolution SigLIP-2, whose patch embedding is a convolution, and models without an encoder."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phivision_jax.config import ModelConfig, ProjectorConfig, VisionConfig
from phivision_jax.convert.hf_config import config_json, model_config
from phivision_jax.convert.mapping import hf_shapes, model_leaves
from tests.support.commands import Run, refused, succeeded
from tests.support.released_layout import (
    SMALL,
    VISION,
    projector_shapes,
    random_tensors,
    read_tensors,
    text_shapes,
    vision_shapes,
    write_hf,
)

PATCH, SIDE, JOINED = 3, 2, 2
# 8 pixels hold two patches of 3, and two pixels that the convolution drops.
TOWER = {"model_type": "siglip_vision_model", "hidden_size": 12, "image_size": 8, "intermediate_size": 20}
TOWER |= {"num_attention_heads": 2, "num_hidden_layers": 3, "patch_size": PATCH}
CONFIG = SMALL | {"vision_config": TOWER, "mm_hidden_size": JOINED * 12, "image_layout": "tiles"}


def tower_shapes(prefix: str = VISION) -> dict[str, tuple[int, ...]]:
    shapes = vision_shapes(12, 20, 3, PATCH, SIDE**2, prefix)
    return shapes | {f"{prefix}.embeddings.patch_embedding.weight": (12, 3, PATCH, PATCH)}


SHAPES = text_shapes(16, 24, 3, 4, 2, 48) | tower_shapes() | projector_shapes(JOINED * 12, 16)


def test_round_trip_has_the_same_bytes(tmp_path: Path, run: Run) -> None:
    hf = write_hf(tmp_path / "hf", CONFIG, random_tensors(SHAPES, np.float32))
    succeeded(run("to-jax", hf, tmp_path / "ours"))
    succeeded(run("to-hf", tmp_path / "ours", tmp_path / "back", "--like", hf))
    names = sorted(str(path.relative_to(hf)) for path in hf.rglob("*") if path.is_file())
    assert [n for n in names if (hf / n).read_bytes() != (tmp_path / "back" / n).read_bytes()] == []
    assert len(names) == sum(path.is_file() for path in (tmp_path / "back").rglob("*"))
    succeeded(run("to-hf", tmp_path / "ours", tmp_path / "alone"))
    assert json.loads((tmp_path / "alone" / "config.json").read_text()) == CONFIG
    succeeded(run("verify", tmp_path / "ours", tmp_path / "alone"))


def test_config_from_nothing_reads_back() -> None:
    assert model_config(CONFIG).tile_size == SIDE * PATCH
    model = dataclasses.replace(model_config(CONFIG), projector=ProjectorConfig(3), max_image_tokens=8)
    written = json.loads(json.dumps(config_json(model)))
    assert model_config(written) == model and model.vision.num_positions == SIDE**2
    assert written["vision_config"]["image_size"] == SIDE * PATCH and "num_patches" not in written["vision_config"]
    assert "auto_map" not in written and "architectures" not in written and "mm_vision_tower" not in written


@pytest.mark.parametrize(("patch", "side"), [(14, 27), (16, 24)])
def test_released_encoders(patch: int, side: int) -> None:
    """The vision_config of google/siglip2-so400m-patch14-384 and -patch16-384, and the tensors of its embeddings."""
    tower = {"model_type": "siglip_vision_model", "hidden_size": 1152, "image_size": 384, "intermediate_size": 4304}
    tower |= {"num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": patch}
    model = model_config(CONFIG | {"vision_config": tower, "mm_hidden_size": 3 * 1152})
    want = VisionConfig("siglip2_fixed", patch_size=patch, num_positions=side**2)
    assert model.vision == want and model.projector.merge_size == 3
    shapes = {name: shape for name, shape in hf_shapes(model_leaves(model)).items() if name.startswith(VISION)}
    assert shapes[f"{VISION}.embeddings.patch_embedding.weight"] == (1152, 3, patch, patch)
    assert shapes[f"{VISION}.embeddings.position_embedding.weight"] == (side**2, 1152)
    assert sum(map(math.prod, shapes.values())) == {14: 428_225_600, 16: 428_256_704}[patch] and len(shapes) == 448


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_layout": None}, "no image_layout: name the layout of its tiles"),
        ({"image_layout": "naflex"}, "choose a layout of tiles, like 'multicrop'"),
        ({"mm_hidden_size": 18}, "mm_hidden_size is 18, no multiple of the encoder's hidden_size 12"),
        ({"vision_config": TOWER | {"image_size": 2}}, r"vision\.num_positions must be from 1"),
        ({"vision_config": TOWER | {"vision_use_head": False}}, "vision_use_head is False"),
    ],
)
def test_config_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_config(CONFIG | changes)


def test_compose_takes_the_layout(tmp_path: Path, run: Run) -> None:
    text = {k: x for k, x in SMALL.items() if k != "vision_config" and "mm_" not in k and "patches" not in k}
    write_hf(
        tmp_path / "phi4", text | {"model_type": "phi3"}, random_tensors(text_shapes(16, 24, 3, 4, 2, 48), "f4"), 1
    )
    tower = random_tensors(tower_shapes("vision_model"), np.float32)
    write_hf(tmp_path / "siglip", {"model_type": "siglip", "vision_config": TOWER}, tower, 1)
    parts = ("--decoder", tmp_path / "phi4", "--vision", tmp_path / "siglip")
    refused(run("to-jax", tmp_path / "x", *parts), "choose a layout of tiles, like")
    succeeded(run("to-jax", tmp_path / "start", *parts, "--layout", "tiles", "--merge-size", JOINED))
    succeeded(run("to-hf", tmp_path / "start", tmp_path / "hf"))
    got = read_tensors(tmp_path / "hf")
    assert {name: tensor.shape for name, tensor in got.items()} == SHAPES
    for name, tensor in tower.items():
        np.testing.assert_array_equal(got[f"model.vision_tower.vision_tower.{name}"], tensor)


def test_early_fusion_has_no_hugging_face_form() -> None:
    small = model_config(SMALL)
    early = VisionConfig("early_fusion", hidden_size=16, patch_size=2, num_positions=4)
    model = ModelConfig(vision=early, decoder=small.decoder)
    with pytest.raises(ValueError, match="'early_fusion' has no Hugging Face form"):
        config_json(model)
    paths = {leaf.path for leaf in model_leaves(model) if not leaf.path.startswith("decoder/")}
    embedding = {f"vision/patch_embedding/{name}" for name in ("kernel", "bias")}
    assert paths == {*embedding, "vision/position_embedding/embedding"}
