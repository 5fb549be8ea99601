"""The mesh, the rules, and the shardings that follow from them, by hand."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from phivision_jax import sharding
from phivision_jax.batch import RowShape, batch_spec
from phivision_jax.config import DecoderConfig, ModelConfig, VisionConfig
from phivision_jax.models import phivision

_, STATE = phivision.abstract(ModelConfig())
SHAPE = RowShape(64, 2, 16)


def test_make_mesh_defaults_to_all_devices():
    assert dict(sharding.make_mesh().shape) == {"slice": 1, "data": 1, "fsdp": 8, "tensor": 1, "context": 1}
    assert dict(sharding.make_mesh({"data": 8}).shape) == {"slice": 1, "data": 8, "fsdp": 1, "tensor": 1, "context": 1}


@pytest.mark.parametrize(
    ("devices", "slices", "tensor", "context", "expected"),
    [
        (8, 1, 1, 1, (1, 1, 8, 1, 1)),
        (256, 1, 1, 1, (1, 8, 32, 1, 1)),  # groups of 32, replicas beyond
        (256, 2, 1, 4, (2, 1, 32, 1, 4)),
        (96, 1, 2, 1, (1, 2, 24, 2, 1)),  # 48 = 2 x 24: 32 does not divide it
    ],
)
def test_default_sizes(devices, slices, tensor, context, expected):
    assert tuple(sharding.default_sizes(devices, slices, tensor, context).values()) == expected


def test_default_sizes_rejects_sizes_that_do_not_divide():
    with pytest.raises(ValueError, match="8 devices do not divide into slice 1 x tensor 3 x context 1"):
        sharding.default_sizes(8, tensor=3)


@pytest.mark.parametrize(
    ("devices", "gib", "expected"),
    [
        (8, 31.25, (4, 1, 2)),  # v6e-8: 14 GiB of 28 on each
        (8, 15.75, (2, 2, 2)),  # v5litepod-8
        (1, 80, (1, 1, 1)),
        (3, 24, (1, 1, 2)),  # three devices share nothing of 5120 and 1152, two do
        (8, None, (1, 4, 2)),  # unknown: as many shards as possible
        (8, 1, (1, 4, 2)),  # too little: as many shards as possible
    ],
)
def test_generation_sizes_of_released_model(devices, gib, expected):
    found = sharding.generation_sizes(STATE, 2, devices, gib and gib * 2**30)
    assert tuple(found.values()) == expected


def test_generation_sizes_divide_odd_heads_and_widths():
    """Three vision heads of 14 and widths of 48 and 42: nothing for tensor, six for fsdp."""
    vision = VisionConfig(hidden_size=42, num_heads=3)
    decoder = DecoderConfig(hidden_size=48, num_heads=6, num_kv_heads=2, num_layers=1)
    _, state = phivision.abstract(ModelConfig(vision=vision, decoder=decoder))
    sizes = sharding.generation_sizes(state, 4, 8, None)
    assert sizes == {"data": 4, "fsdp": 2, "tensor": 1}
    sharding.param_shardings(state, sharding.make_mesh(sizes))


@pytest.mark.parametrize(
    ("shape", "message"), [({"fsdp": 3}, "needs 3 devices, but there are 8"), ({"model": 8}, "'model' does not exist")]
)
def test_make_mesh_rejects_shape(shape, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(shape)


def test_make_mesh_groups_neighbours_into_slices():
    mesh = sharding.make_mesh({"slice": 2, "fsdp": 4})
    assert [[d.id for d in part.flat] for part in mesh.devices] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_make_mesh_needs_the_devices_slices():
    chips = [SimpleNamespace(platform="tpu", slice_index=i // 4) for i in range(8)]
    assert sharding.num_slices(chips) == 2 and sharding.num_slices(jax.devices()) is None
    with pytest.raises(ValueError, match=r"slice is 1, but the devices are in 2 slices; set slice=2"):
        sharding.make_mesh({"fsdp": 8}, chips)
    with pytest.raises(ValueError, match=r"slice is 4, but the devices are in 2 slices"):
        sharding.make_mesh({"slice": 4, "fsdp": 2}, chips)


def test_partition_spec_rejects_unknown_axis():
    with pytest.raises(ValueError, match="'embd' has no rule"):
        sharding.partition_spec(("embd",))


def test_param_shardings_rejects_two_axes_on_one_mesh_axis():
    message = (
        r"self_attn/\w+/kernel: logical axes '(kv_)?heads' and 'head_dim' both map to mesh axis 'tensor' .*"
        r"heads' is 'tensor', 'head_dim' is \('data', 'tensor'\)"
    )
    with pytest.raises(ValueError, match=message), sharding.override_rules({"head_dim": ("data", "tensor")}):
        sharding.param_shardings(STATE, sharding.make_mesh())


def test_param_shardings_of_released_model():
    shardings = sharding.param_shardings(STATE, sharding.make_mesh({"fsdp": 4, "tensor": 2}))
    layers = shardings["decoder"]["layers"]
    assert layers["self_attn"]["q_proj"]["kernel"].spec == PartitionSpec(None, "fsdp", "tensor", None)
    assert layers["self_attn"]["k_proj"]["kernel"].spec == PartitionSpec(None, "fsdp", "tensor", None)
    assert layers["mlp"]["down_proj"]["kernel"].spec == PartitionSpec(None, "tensor", "fsdp")
    assert shardings["decoder"]["embed_tokens"]["embedding"].spec == PartitionSpec("tensor", "fsdp")


def test_param_shardings_replicate_small_parameters_only():
    shardings = sharding.param_shardings(STATE, sharding.make_mesh({"fsdp": 8}))
    shapes = phivision.nnx.to_pure_dict(STATE)
    for leaf, found in zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True):
        assert not found.is_fully_replicated or leaf.size < 2**20, (leaf.shape, found)


def test_param_shardings_rejects_ten_kv_heads_over_four():
    message = r"k_proj/kernel: its axis 'kv_heads' of 10 .* sharding_rules=\(\('kv_heads', ''\),\)"
    with pytest.raises(ValueError, match=message):
        sharding.param_shardings(STATE, sharding.make_mesh({"fsdp": 2, "tensor": 4}))


def test_override_rules_replicates_kv_heads():
    with sharding.override_rules({"kv_heads": None}):
        shardings = sharding.param_shardings(STATE, sharding.make_mesh({"fsdp": 2, "tensor": 4}))
    attention = shardings["decoder"]["layers"]["self_attn"]
    assert attention["k_proj"]["kernel"].spec == PartitionSpec(None, "fsdp", None, None)
    assert attention["k_proj"]["kernel"].shard_shape((40, 5120, 10, 128)) == (40, 2560, 10, 128)
    assert attention["q_proj"]["kernel"].shard_shape((40, 5120, 40, 128)) == (40, 2560, 10, 128)
    assert sharding.rule("kv_heads") == "tensor"  # outside nothing has changed


def test_override_rules_nests_and_reaches_constraints():
    mesh, x = sharding.make_mesh({"fsdp": 4, "tensor": 2}), jax.numpy.ones((8, 8))
    with jax.set_mesh(mesh), sharding.override_rules({"heads": "fsdp", "batch": None}):
        with sharding.override_rules({"batch": "tensor"}):
            inner = jax.jit(lambda x: sharding.constrain(x, "batch", "heads"))(x)
        outer = jax.jit(lambda x: sharding.constrain(x, "batch", "heads"))(x)
    assert inner.sharding.shard_shape((8, 8)) == (4, 2) and outer.sharding.shard_shape((8, 8)) == (8, 2)


@pytest.mark.parametrize(
    ("rules", "message"),
    [({"kv_head": None}, "'kv_head' has no rule"), ({"heads": ("fsdp", "model")}, "'model' does not exist")],
)
def test_override_rules_rejects_unknown_axes(rules, message):
    with pytest.raises(ValueError, match=message):
        sharding.override_rules(rules)


def test_abstract_carries_shardings_and_dtype():
    mesh = sharding.make_mesh()
    rows, everywhere = sharding.row_sharding(mesh), sharding.replicated(mesh)
    tree = {"a": np.zeros((8, 2), np.float32), "b": np.zeros(3, np.int32)}
    found = sharding.abstract(tree, {"a": rows, "b": everywhere})
    assert found["a"] == jax.ShapeDtypeStruct((8, 2), np.float32, sharding=rows)
    assert found["b"] == jax.ShapeDtypeStruct((3,), np.int32, sharding=everywhere)
    same = sharding.abstract(tree, everywhere, np.float16)
    assert {(name, x.sharding, x.dtype.name) for name, x in same.items()} == {
        ("a", everywhere, "float16"), ("b", everywhere, "int32")
    }  # fmt: skip


def test_param_shardings_rejects_wrong_number_of_axes():
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
def test_batch_shardings_keep_images_with_their_text(shape):
    """By hand from the mesh: device (slice, data, fsdp, tensor, context) has its rows, and its shard of each row."""
    mesh, spec = sharding.make_mesh(shape), batch_spec(8, SHAPE)
    shardings = {field: found for field, found in sharding.batch_shardings(mesh, spec)._asdict().items() if found}
    context, groups = shape.get("context", 1), 8 // shape.get("tensor", 1) // shape.get("context", 1)
    for coordinates, device in np.ndenumerate(mesh.devices):
        group, c = int(np.ravel_multi_index(coordinates[:3], mesh.devices.shape[:3])), coordinates[4]
        mine = set(range(8)[group * 8 // groups : (group + 1) * 8 // groups])
        for field, found in shardings.items():
            size = getattr(spec, field).shape
            index, part = found.devices_indices_map(size)[device], size[1] // context
            assert set(range(8)[index[0]]) == mine, field
            assert set(range(size[1])[index[1]]) == set(range(c * part, (c + 1) * part)), field
            assert all(i == slice(None) for i in index[2:])


def test_batch_shardings_do_not_split_merge_tables():
    mesh = sharding.make_mesh({"fsdp": 4, "context": 2})
    shardings = sharding.batch_shardings(mesh, batch_spec(8, dataclasses.replace(SHAPE, merge=(6, 4, 1))))
    for found in (shardings.merge_index, shardings.merge_weight):
        assert found.shard_shape((8, 6, 4, 1)) == (2, 6, 4, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 6}, r"data\.batch_rows is 6, .*\('slice', 'data', 'fsdp'\) \(4 shards: .*'batch', .*multiple of 4"),
        ({"length": 63}, r"data\.length is 63, .*\('context',\) \(2 shards: the rule of 'length'"),
        ({"vision_rows": 3}, r"data\.vision_rows is 3, .*'vision_rows', for patches"),
    ],
)
def test_batch_shardings_rejects_sizes_that_do_not_divide(change, message):
    mesh = sharding.make_mesh({"fsdp": 4, "context": 2})
    rows, shape = change.get("rows", 8), {name: size for name, size in change.items() if name != "rows"}
    with pytest.raises(ValueError, match=message):
        sharding.batch_shardings(mesh, batch_spec(rows, dataclasses.replace(SHAPE, **shape)))


def test_constrain_without_mesh_does_nothing():
    x = jax.numpy.ones(3)
    assert sharding.constrain(x, "batch") is x


def test_constrain_pins_sharding_by_logical_names():
    mesh = sharding.make_mesh({"fsdp": 2, "tensor": 2, "context": 2})
    with jax.set_mesh(mesh):
        x = jax.jit(lambda x: sharding.constrain(x, "batch", "length", "heads", None))(jax.numpy.ones((8, 4, 2, 3)))
        assert sharding.axis_size("batch") == 2 and sharding.axis_size("head_dim") == 1
    assert x.sharding.shard_shape(x.shape) == (4, 2, 1, 3)
    assert sharding.axis_size("batch") == 1
