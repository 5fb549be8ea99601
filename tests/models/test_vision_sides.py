"""The vision sides beside NaFlex: fixed-resolution SigLIP-2 against transformers, and early fusion."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from phivision_jax.batch import Batch
from phivision_jax.config import LoraConfig, ModelConfig, ProjectorConfig, VisionConfig
from phivision_jax.convert import mapping
from phivision_jax.convert.hf_config import vision_config
from phivision_jax.images.layout import PatchedImage
from phivision_jax.models import phivision
from phivision_jax.models.siglip2 import Siglip2Encoder
from phivision_jax.rows import batch_from_ids
from tests.golden.fixed_resolution import CONFIGS
from tests.support.batches import TINY, random_rows

CASES = Path(__file__).parents[1] / "golden" / "cases"
EARLY = dataclasses.replace(
    TINY,
    vision=VisionConfig(encoder="early_fusion", hidden_size=TINY.decoder.hidden_size, patch_size=2, num_positions=16),
)


def patches_of(tile: np.ndarray, side: int, patch: int) -> np.ndarray:
    """Patches of the tile's upper left: pixels beyond the last complete patch are dropped, as by the convolution."""
    pixels = tile[: side * patch, : side * patch].reshape(side, patch, side, patch, 3)
    return np.ascontiguousarray(pixels.transpose(0, 2, 1, 3, 4)).reshape(side**2, patch**2 * 3)


def encoder(config: VisionConfig, tensors: dict[str, np.ndarray]) -> Siglip2Encoder:
    """The encoder with weights from a checkpoint of it alone."""
    leaves = mapping.vision_leaves(config, mapping.SIGLIP2_PREFIX)
    mapping.check({n: t.shape for n, t in tensors.items()}, mapping.hf_shapes(leaves), "golden")
    model = Siglip2Encoder(config, rngs=nnx.Rngs(0), dtype=jnp.float32, remat="none")
    ours = {}
    for leaf in leaves:
        if leaf.path.startswith("vision/"):
            layers = [leaf.to_ours(tensors[name]) for name in leaf.names]
            ours[tuple(leaf.path.split("/")[1:])] = jnp.asarray(np.stack(layers) if leaf.stacked else layers[0])
    graphdef, state = nnx.split(model)
    assert {path for path, _ in nnx.to_flat_state(state)} == ours.keys()
    nnx.replace_by_pure_dict(state, nnx.traversals.unflatten_mapping(ours))
    return nnx.merge(graphdef, state)


def batch_of(config: VisionConfig, tiles: np.ndarray) -> Batch:
    # Rows hold tiles like images of any size, so their layout does not matter here.
    model = dataclasses.replace(TINY, vision=dataclasses.replace(config, encoder="siglip2"))
    grid = config.position_side, config.position_side
    images = [PatchedImage(patches_of(tile, grid[0], config.patch_size), (grid,)) for tile in tiles]
    n = len(images[0].patches) * len(images)
    return batch_from_ids([[-200] * len(images)], [images], config=model, length=n, num_patches=n)


@pytest.mark.parametrize("name", CONFIGS)
def test_fixed_resolution_matches_transformers(name: str) -> None:
    with np.load(CASES / f"fixed_{name}.npz") as arrays:
        tensors = {key: arrays[key] for key in arrays.files}
    tiles, want = tensors.pop("tiles"), tensors.pop("features")
    config = vision_config(name, CONFIGS[name])
    assert config.encoder == "siglip2_fixed" and config.num_positions == want.shape[1]
    got = encoder(config, tensors)(batch_of(config, tiles)).reshape(want.shape)
    assert np.abs(np.asarray(got) - want).max() <= 2e-5 and want.std() > 1


def test_convolution_kernel_by_hand() -> None:
    """Entry (color c, row y, column x) of a kernel multiplies number (2y + x)·3 + c of a flattened 2x2 patch."""
    config = VisionConfig("siglip2_fixed", hidden_size=2, num_heads=1, patch_size=2, num_positions=4)
    leaf = next(leaf for leaf in mapping.vision_leaves(config) if leaf.path == "vision/patch_embedding/kernel")
    kernel = np.arange(24).reshape(2, 3, 2, 2)
    ours = leaf.to_ours(kernel)
    assert ours.shape == leaf.shape == (12, 2) and leaf.row_axis == 1
    assert all(ours[(2 * y + x) * 3 + c, o] == kernel[o, c, y, x] for o, c, y, x in np.ndindex(kernel.shape))
    np.testing.assert_array_equal(leaf.to_theirs(ours[:, 1:]), kernel[1:])


# ---------------------------------------------------------------------------------------------------------------------
# Early fusion.


def random_params(state: Any) -> phivision.Params:
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(0.2 * rng.normal(size=x.shape), jnp.float32), nnx.to_pure_dict(state))


def test_early_fusion_by_hand() -> None:
    graphdef, state = phivision.abstract(EARLY)
    params = random_params(state)
    assert "projector" not in params and set(params["vision"]) == {"patch_embedding", "position_embedding"}
    model = phivision.merge(graphdef, params)
    batch = random_rows(np.random.default_rng(1), EARLY, [[(3, [(4, 4)])]])
    linear, table = params["vision"]["patch_embedding"], params["vision"]["position_embedding"]["embedding"]
    pixels = batch.patches[0, 0, :16].astype(np.float32) / 127.5 - 1
    want = pixels @ linear["kernel"] + linear["bias"] + table  # a grid of the table's size
    np.testing.assert_allclose(model.vision_tokens(batch)[0, :16], want, atol=1e-5)
    np.testing.assert_allclose(model.embeds(batch)[0, batch.vision_index[0] == 5], want[5:6], atol=1e-5)


def test_early_fusion_adapters() -> None:
    cfg = LoraConfig(rank=2, targets="vision/patch_embedding")
    params = nnx.to_pure_dict(phivision.abstract(EARLY, lora=cfg)[1])
    assert params["vision"]["patch_embedding"]["lora_a"].shape == (12, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Combinations that are refused.

FIXED = dataclasses.replace(TINY.vision, encoder="siglip2_fixed")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision": FIXED}, "encodes tiles 8 pixels wide: choose a layout of tiles, like 'multicrop'"),
        ({"vision": FIXED, "image_layout": "s2"}, "8 pixels wide: set tile_size=8"),
        ({"vision": VisionConfig("early_fusion")}, "needs the decoder's width, hidden_size=32"),
        ({"vision": EARLY.vision, "projector": ProjectorConfig(3)}, "no projector: set projector.merge_size=1"),
    ],
)
def test_config_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


def refused(config: ModelConfig, batch: Batch, message: str) -> None:
    graphdef, state = phivision.abstract(config)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda p: phivision.merge(graphdef, p).vision_tokens(batch), nnx.to_pure_dict(state))


def test_vision_tokens_refuse_other_tables_and_patches() -> None:
    batch = random_rows(np.random.default_rng(1), TINY, [[(3, [(2, 2)])]])
    joined = dataclasses.replace(TINY, projector=ProjectorConfig(2))
    refused(joined, batch, r"joins 1 features to a vision token, but projector\.merge_size is 2")
    table = np.zeros((1, 4, 3, 2), np.int32)
    merged = batch._replace(merge_index=table, merge_weight=table.astype(np.float32))
    refused(joined, merged, r"joins 3 features to a vision token, but projector\.merge_size is 2")
    wide = dataclasses.replace(TINY, vision=dataclasses.replace(TINY.vision, patch_size=4))
    refused(wide, batch, r"patches of 12 numbers, but vision\.patch_size 4 has 48")
