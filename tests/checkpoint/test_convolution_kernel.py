"""The patch embedding of a fixed-resolution encoder, a convolution there and a product here: int8 and adapters."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from phivision_jax import sharding
from phivision_jax.checkpoint import loading
from phivision_jax.config import LoraConfig, VisionConfig
from phivision_jax.convert import mapping
from phivision_jax.convert.adapters import peft_files
from phivision_jax.convert.ours import OursSource
from phivision_jax.models import lora, phivision
from phivision_jax.models.siglip2 import VisionTail
from tests.support.batches import TINY
from tests.support.checkpoints import save_checkpoint

VISION = VisionConfig("siglip2_fixed", hidden_size=24, intermediate_size=32, num_layers=2, num_heads=2, patch_size=2)
CONFIG = dataclasses.replace(TINY, vision=VISION, image_layout="multicrop", tile_size=VISION.tile_pixels)
LORA = LoraConfig(rank=3, alpha=6.0, targets="patch_embedding")


def saved(folder: Path, adapted: LoraConfig | None, run: dict) -> tuple[Path, dict]:
    """A checkpoint with random weights, and its parameters."""
    tail = nnx.eval_shape(lambda: VisionTail(VISION, rngs=nnx.Rngs(0)))
    tree = nnx.to_pure_dict(phivision.abstract(CONFIG, lora=adapted)[1])
    tree |= {"vision_tail": nnx.to_pure_dict(nnx.state(tail, nnx.Param))}
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), tree)
    return save_checkpoint(folder / "checkpoint", params, CONFIG, {"run": run}), params


def test_adapter_is_merged_into_the_convolution(tmp_path: Path) -> None:
    path, params = saved(tmp_path, LORA, {"lora": dataclasses.asdict(LORA)})
    leaves = mapping.model_leaves(CONFIG)
    source = OursSource(path, loading.layout.read_meta(path), leaves)
    leaf = next(leaf for leaf in leaves if leaf.path == "vision/patch_embedding/kernel")
    (convolution,) = source.read(leaf, range(1), range(24))
    assert convolution.shape == (24, 3, 2, 2)
    merged = lora.merge({"vision": params["vision"]}, LORA)["vision"]["patch_embedding"]["kernel"]
    np.testing.assert_allclose(leaf.to_ours(convolution), merged, atol=1e-5)
    with pytest.raises(ValueError, match="patch_embedding/kernel has an adapter, but is a convolution to PEFT"):
        peft_files(source)


def test_convolution_in_int8(tmp_path: Path) -> None:
    path, params = saved(tmp_path, None, {})
    state = phivision.abstract(CONFIG, weights="int8")[1]
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = sharding.abstract(nnx.to_pure_dict(state), device)
    found = loading.read_params(path, CONFIG, target)["vision"]["patch_embedding"]
    assert found["kernel"].dtype == np.int8 and found["scale"].shape == (24,)
    kernel = params["vision"]["patch_embedding"]["kernel"]
    np.testing.assert_allclose(found["kernel"] * found["scale"], kernel, atol=float(np.abs(kernel).max()) / 200)
