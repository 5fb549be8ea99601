import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from phivision_jax import sharding
from phivision_jax.batch import RowShape, batch_spec
from phivision_jax.config import ModelConfig
from phivision_jax.models import phivision

_, STATE = phivision.abstract(ModelConfig())
SHAPE = RowShape(64, 2, 16)


def test_a_mesh_takes_all_devices_by_default():
    assert dict(sharding.make_mesh().shape) == {"slice": 1, "data": 1, "fsdp": 8, "tensor": 1, "context": 1}
    assert dict(sharding.make_mesh({"data": 8}).shape) == {"slice": 1, "data": 8, "fsdp": 1, "tensor": 1, "context": 1}


@pytest.mark.parametrize(
    ("devices", "slices", "tensor", "context", "expected"),
    [
        (8, 1, 1, 1, (1, 1, 8, 1, 1)),
        (256, 1, 1, 1, (1, 8, 32, 1, 1)),  # groups of 32, copies beyond
        (256, 2, 1, 4, (2, 1, 32, 1, 4)),
        (96, 1, 2, 1, (1, 2, 24, 2, 1)),  # 48 = 2 x 24: 32 does not divide it
    ],
)
def test_default_sizes(devices, slices, tensor, context, expected):
    assert tuple(sharding.default_sizes(devices, slices, tensor, context).values()) == expected


def test_default_sizes_that_do_not_divide():
    with pytest.raises(ValueError, match="8 devices do not divide into slice 1 x tensor 3 x context 1"):
        sharding.default_sizes(8, tensor=3)


@pytest.mark.parametrize(
    ("shape", "message"), [({"fsdp": 3}, "needs 3 devices, but there are 8"), ({"model": 8}, "'model' does not exist")]
)
def test_a_mesh_that_cannot_be(shape, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(shape)


def test_simulated_slices_are_neighbours():
    mesh = sharding.make_mesh({"slice": 2, "fsdp": 4})
    assert [[d.id for d in part.flat] for part in mesh.devices] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_a_mesh_has_the_slices_that_its_devices_are_in():
    chips = [SimpleNamespace(platform="tpu", slice_index=i // 4) for i in range(8)]
    assert sharding.num_slices(chips) == 2 and sharding.num_slices(jax.devices()) is None
    with pytest.raises(ValueError, match=r"slice is 1, but the devices are in 2 slices; set slice=2"):
        sharding.make_mesh({"fsdp": 8}, chips)
    with pytest.raises(ValueError, match=r"slice is 4, but the devices are in 2 slices"):
        sharding.make_mesh({"slice": 4, "fsdp": 2}, chips)


def test_an_unknown_logical_axis_is_named():
    with pytest.raises(ValueError, match="'embd' has no rule"):
        sharding.partition_spec(("embd",))


def test_two_axes_on_one_mesh_axis_name_the_parameter_and_both_rules(monkeypatch):
    monkeypatch.setitem(sharding.RULES, "head_dim", ("data", "tensor"))
    message = (
        r"self_attn/\w+/kernel: logical axes '(kv_)?heads' and 'head_dim' both map to mesh axis 'tensor' .*"
        r"heads' is 'tensor', 'head_dim' is \('data', 'tensor'\)"
    )
    with pytest.raises(ValueError, match=message):
        sharding.param_shardings(STATE, sharding.make_mesh())


def test_the_released_model_shards_over_fsdp_and_tensor():
    at = sharding.param_shardings(STATE, sharding.make_mesh({"fsdp": 4, "tensor": 2}))
    layers = at["decoder"]["layers"]
    assert layers["self_attn"]["q_proj"]["kernel"].spec == PartitionSpec(None, "fsdp", "tensor", None)
    assert layers["self_attn"]["k_proj"]["kernel"].spec == PartitionSpec(None, "fsdp", "tensor", None)
    assert layers["mlp"]["down_proj"]["kernel"].spec == PartitionSpec(None, "tensor", "fsdp")
    assert at["decoder"]["embed_tokens"]["embedding"].spec == PartitionSpec("tensor", "fsdp")


def test_no_parameter_is_whole_on_a_device_but_the_small():
    at = sharding.param_shardings(STATE, sharding.make_mesh({"fsdp": 8}))
    shapes = phivision.nnx.to_pure_dict(STATE)
    for leaf, where in zip(jax.tree.leaves(shapes), jax.tree.leaves(at), strict=True):
        assert not where.is_fully_replicated or leaf.size < 2**20, (leaf.shape, where)


def test_ten_kv_heads_over_four_name_the_parameter_and_the_rule():
    with pytest.raises(ValueError, match=r"k_proj/kernel: its axis 'kv_heads' of 10 .* 'kv_heads' to None"):
        sharding.param_shardings(STATE, sharding.make_mesh({"fsdp": 2, "tensor": 4}))


def test_ten_kv_heads_go_over_four_once_a_rule_says_that_every_device_has_all(monkeypatch):
    monkeypatch.setitem(sharding.RULES, "kv_heads", None)
    at = sharding.param_shardings(STATE, sharding.make_mesh({"fsdp": 2, "tensor": 4}))["decoder"]["layers"]["self_attn"]
    assert at["k_proj"]["kernel"].spec == PartitionSpec(None, "fsdp", None, None)
    assert at["k_proj"]["kernel"].shard_shape((40, 5120, 10, 128)) == (40, 2560, 10, 128)
    assert at["q_proj"]["kernel"].shard_shape((40, 5120, 40, 128)) == (40, 2560, 10, 128)


def test_shape_and_axes_must_match():
    _, state = phivision.abstract(ModelConfig())
    state["decoder"]["norm"]["scale"].set_metadata(out_sharding=("embed", None))
    with pytest.raises(ValueError, match=r"decoder/norm/scale: shape \(5120,\) but logical axes"):
        sharding.param_shardings(state, sharding.make_mesh())


MESHES = [
    {"data": 8},
    {"slice": 2, "fsdp": 4},
    {"fsdp": 2, "tensor": 2, "context": 2},
    {"data": 2, "fsdp": 2, "context": 2},
]


@pytest.mark.parametrize("shape", MESHES)
def test_a_rows_images_live_where_its_text_does(shape):
    """By hand from the mesh: device (slice, data, fsdp, tensor, context) has its rows, and its part of each of them."""
    mesh, spec = sharding.make_mesh(shape), batch_spec(8, SHAPE)
    at = sharding.batch_shardings(mesh, spec)
    cut, parts = shape.get("context", 1), 8 // shape.get("tensor", 1) // shape.get("context", 1)
    rows = {
        field: where.devices_indices_map(getattr(spec, field).shape) for field, where in at._asdict().items() if where
    }
    for place, device in np.ndenumerate(mesh.devices):
        group, c = int(np.ravel_multi_index(place[:3], mesh.devices.shape[:3])), place[4]
        mine = set(range(8)[group * 8 // parts : (group + 1) * 8 // parts])
        for field, where in rows.items():
            index, shape_of = where[device], getattr(spec, field).shape
            assert set(range(8)[index[0]]) == mine, field
            size = shape_of[1] // cut
            assert set(range(shape_of[1])[index[1]]) == set(range(c * size, (c + 1) * size)), field
            assert all(i == slice(None) for i in index[2:])


def test_a_merge_table_names_features_of_the_whole_row():
    mesh = sharding.make_mesh({"fsdp": 4, "context": 2})
    at = sharding.batch_shardings(mesh, batch_spec(8, dataclasses.replace(SHAPE, merge=(6, 4, 1))))
    for where in (at.merge_index, at.merge_weight):
        assert where.shard_shape((8, 6, 4, 1)) == (2, 6, 4, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 6}, r"data\.batch_rows is 6, .*\('slice', 'data', 'fsdp'\) \(4 parts: .*'batch', .*multiple of 4"),
        ({"length": 63}, r"data\.length is 63, .*\('context',\) \(2 parts: the rule of 'length'"),
        ({"vision_rows": 3}, r"data\.vision_rows is 3, .*'vision_rows', for patches"),
    ],
)
def test_a_batch_that_does_not_divide_names_its_setting(change, message):
    mesh = sharding.make_mesh({"fsdp": 4, "context": 2})
    rows, shape = change.get("rows", 8), {name: size for name, size in change.items() if name != "rows"}
    with pytest.raises(ValueError, match=message):
        sharding.batch_shardings(mesh, batch_spec(rows, dataclasses.replace(SHAPE, **shape)))


def test_constrain_outside_a_mesh_does_nothing():
    x = jax.numpy.ones(3)
    assert sharding.constrain(x, "batch") is x


def test_constrain_in_a_mesh_places_by_logical_names():
    mesh = sharding.make_mesh({"fsdp": 2, "tensor": 2, "context": 2})
    with jax.set_mesh(mesh):
        x = jax.jit(lambda x: sharding.constrain(x, "batch", "length", "heads", None))(jax.numpy.ones((8, 4, 2, 3)))
        assert sharding.axis_size("batch") == 2 and sharding.axis_size("head_dim") == 1
    assert x.sharding.shard_shape(x.shape) == (4, 2, 1, 3)
    assert sharding.axis_size("batch") == 1
