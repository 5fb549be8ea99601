"""Resolve a configuration's open choices for real slices: sizes divide, and nothing stays open."""

import dataclasses
import math

import jax
import pytest

from phivision_jax import sharding
from phivision_jax.batch import RowShape, batch_spec
from phivision_jax.config import ModelConfig
from phivision_jax.hardware.layouts import LAYOUTS, OTHER
from phivision_jax.models import remat
from phivision_jax.training.device_layout import resolve, resolve_for
from phivision_jax.training.run_config import DataConfig, MeshConfig
from tests.support.recipe import PODS, STAGES, recipe


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("kind", "devices", "slices"), PODS)
def test_resolve_recipe_divides_on_every_slice(stage, kind, devices, slices):
    cfg = resolve_for(recipe(stage), kind, devices, slices)
    mesh, data = cfg.mesh, cfg.data
    assert math.prod(dataclasses.astuple(mesh)) == devices
    assert min(dataclasses.astuple(mesh)) >= 1 and mesh.slice == slices
    groups = mesh.slice * mesh.data * mesh.fsdp
    assert cfg.microbatches >= 1 and data.batch_rows % (groups * cfg.microbatches) == 0
    assert data.length % mesh.context == 0 and data.vision_rows % mesh.context == 0
    assert cfg.remat in remat.POLICIES and cfg.vision_remat in remat.POLICIES
    # A device never processes more tokens at a time than its layout allows.
    layouts = LAYOUTS.get(kind, OTHER)
    layout = next(layout for layout in layouts if layout.remat == cfg.remat)
    assert mesh.fsdp <= layout.fsdp
    assert data.batch_rows // groups // cfg.microbatches * (data.length // mesh.context) <= layout.tokens
    assert resolve_for(cfg, kind, devices, slices) == cfg  # nothing was left open


def test_resolve_context_of_stage3():
    """448 rows on 256 chips are 7 for each of 64 groups of 4 (4,096 tokens a chip), on 128 chips groups of 2."""
    for kind, slices in (("TPU v5 lite", 1), ("TPU v6 lite", 1), ("TPU v5", 2)):
        assert resolve_for(recipe("stage3"), kind, 256, slices).mesh.context == 4
    assert resolve_for(recipe("stage3"), "TPU v5", 128).mesh.context == 2
    assert resolve_for(recipe("stage2"), "TPU v5 lite", 256).mesh.context == 1


def test_resolve_takes_fewest_microbatches():
    """768 rows of 8,192 on 128 chips are 6 rows each, one at a time: a v5p processes 8,192 tokens at a time."""
    assert resolve_for(recipe("stage2"), "TPU v5", 128).microbatches == 6
    assert resolve_for(recipe("stage2"), "TPU v5 lite", 256).microbatches == 3
    short = dataclasses.replace(recipe("stage2"), data=DataConfig(batch_rows=768, length=2048, vision_rows=1))
    assert resolve_for(short, "TPU v5", 128).microbatches == 2  # 3 of 6 rows: 4 do not divide
    shared = dataclasses.replace(
        recipe("stage3"),
        mesh=MeshConfig(context=4),
        data=DataConfig(batch_rows=512, length=16_384, vision_rows=4),
    )
    assert resolve_for(shared, "TPU v5 lite", 256).microbatches == 4  # 8 rows of 4,096 tokens each, two at a time


@pytest.mark.parametrize("kind", ["TPU v5 lite", "TPU v5", "TPU v6 lite", "cpu"])
def test_resolve_keeps_given_values(kind):
    given = dataclasses.replace(
        recipe("stage2"),
        mesh=MeshConfig(slice=1, data=8, fsdp=8, tensor=2, context=1),
        remat="offload",
        vision_remat="none",
        microbatches=2,
    )
    expected = dataclasses.replace(given, model=ModelConfig())
    assert dataclasses.asdict(resolve_for(given, kind, 128)) == dataclasses.asdict(expected)


@pytest.mark.parametrize(
    ("mesh", "expected"),
    [
        (MeshConfig(fsdp=16), MeshConfig(1, 16, 16, 1, 1)),
        (MeshConfig(data=4), MeshConfig(1, 4, 64, 1, 1)),
        (MeshConfig(tensor=2), MeshConfig(1, 2, 64, 2, 1)),
        (MeshConfig(slice=2), MeshConfig(2, 2, 64, 1, 1)),
    ],
)
def test_resolve_completes_partial_mesh(mesh, expected):
    cfg = dataclasses.replace(recipe("stage2"), mesh=mesh)
    assert resolve_for(cfg, "TPU v5 lite", 256).mesh == expected


def test_resolve_long_rows():
    long = dataclasses.replace(recipe("stage3"), data=DataConfig(batch_rows=512, length=16_384, vision_rows=4))
    v5e, v5p = resolve_for(long, "TPU v5 lite", 256), resolve_for(long, "TPU v5", 128)
    assert v5e.mesh.context == 2  # at most 8,192 tokens at a time
    assert v5p.mesh.context == 1 and v5p.remat == "full"  # all of the row, with more recompute


def test_resolve_leaves_indivisible_batch_to_the_step():
    odd = dataclasses.replace(recipe("stage2"), data=DataConfig(batch_rows=9, length=8192, vision_rows=1))
    cfg = resolve_for(odd, "cpu", 8)
    assert cfg.mesh.context == 1
    spec = batch_spec(9, RowShape(8192, 1, 16))
    with pytest.raises(ValueError, match=r"data\.batch_rows is 9"):
        sharding.batch_shardings(sharding.make_mesh(dataclasses.asdict(cfg.mesh)), spec)


def test_resolve_matches_resolve_for():
    assert resolve(recipe("stage2"), jax.devices()) == resolve_for(recipe("stage2"), "cpu", len(jax.devices()))
