import dataclasses

import jax
import pytest
from jax.sharding import PartitionSpec

from phivision_jax import sharding
from phivision_jax.config import ModelConfig
from phivision_jax.models import phivision


def test_a_mesh_takes_all_devices_by_default():
    assert dict(sharding.make_mesh().shape) == {"slice": 1, "data": 1, "fsdp": 8, "tensor": 1, "context": 1}


@pytest.mark.parametrize(
    ("shape", "message"), [({"fsdp": 3}, "needs 3 devices, but there are 8"), ({"model": 8}, "'model' does not exist")]
)
def test_a_mesh_that_cannot_be(shape, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(shape)


def test_an_unknown_logical_axis_is_named():
    with pytest.raises(ValueError, match="'embd' has no rule"):
        sharding.partition_spec(("embd",))


def test_the_released_model_shards_over_fsdp_and_tensor():
    _, state = phivision.abstract(ModelConfig())
    at = sharding.param_shardings(state, sharding.make_mesh({"fsdp": 4, "tensor": 2}))
    assert at["decoder"]["layers"]["self_attn"]["q_proj"]["kernel"].spec == PartitionSpec(None, "fsdp", "tensor", None)
    assert at["decoder"]["embed_tokens"]["embedding"].spec == PartitionSpec("tensor", "fsdp")


def test_ten_kv_heads_over_four_name_the_parameter_and_the_rule():
    _, state = phivision.abstract(ModelConfig())
    with pytest.raises(ValueError, match=r"k_proj/kernel: its axis 'kv_heads' of 10 .* 'kv_heads' to None"):
        sharding.param_shardings(state, sharding.make_mesh({"fsdp": 2, "tensor": 4}))


def test_constrain_outside_a_mesh_does_nothing():
    x = jax.numpy.ones(3)
    assert sharding.constrain(x, "batch") is x


def test_every_logical_axis_of_the_model_has_a_rule():
    config = dataclasses.replace(ModelConfig(), image_attention="bidirectional")
    sharding.param_shardings(phivision.abstract(config)[1], sharding.make_mesh(devices=jax.devices()[:1]))
