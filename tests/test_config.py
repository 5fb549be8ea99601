import dataclasses
import json

import pytest

from phivision_jax.sharding import MESH_AXES
from phivision_jax.training.run_config import MeshConfig, RunConfig


def test_from_dict_names_the_nearest_field():
    values = dataclasses.asdict(RunConfig())
    values["optim"]["learnig_rate"] = 1.0
    with pytest.raises(ValueError, match=r"optim\.learnig_rate.*'optim\.learning_rate'"):
        RunConfig.from_dict(values)


def test_run_config_round_trip():
    cfg = RunConfig.from_dict({"optim": {"lr_rules": [["vision", 0.0]]}})
    assert cfg.optim.lr_rules == (("vision", 0.0),)
    assert RunConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(cfg)))) == cfg
    hash(cfg)


@pytest.mark.parametrize(
    ("mesh", "devices", "slices", "expected"),
    [
        (MeshConfig(), 8, 1, (1, 1, 8, 1, 1)),
        (MeshConfig(), 256, 1, (1, 8, 32, 1, 1)),
        (MeshConfig(), 256, 2, (2, 4, 32, 1, 1)),
        (MeshConfig(fsdp=4), 8, 1, (1, 2, 4, 1, 1)),
        (MeshConfig(data=2), 8, 1, (1, 2, 4, 1, 1)),
        (MeshConfig(fsdp=2, tensor=2, context=2), 16, 2, (2, 1, 2, 2, 2)),
        (MeshConfig(slice=2), 8, 1, (2, 1, 4, 1, 1)),  # simulated
        (MeshConfig(slice=1, data=1, fsdp=8, context=1), 8, 1, (1, 1, 8, 1, 1)),
    ],
)
def test_mesh_sizes(mesh, devices, slices, expected):
    sizes = mesh.sizes(devices, slices)
    assert tuple(sizes) == MESH_AXES and tuple(sizes.values()) == expected


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (MeshConfig(tensor=3), "8 devices do not divide into slice 1 x tensor 3 x context 1"),
        (MeshConfig(context=16), "8 devices do not divide into slice 1 x tensor 1 x context 16"),
    ],
)
def test_mesh_sizes_that_do_not_divide(mesh, message):
    with pytest.raises(ValueError, match=message):
        mesh.sizes(8)


@pytest.mark.parametrize(("axis", "size"), [("tensor", -1), ("tensor", 0), ("slice", 0), ("data", 0), ("fsdp", -2)])
def test_mesh_config_refuses_size(axis, size):
    with pytest.raises(ValueError, match=rf"mesh\.{axis} is {size}"):
        MeshConfig(**{axis: size})
