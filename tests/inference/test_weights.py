"""The engine holds matrices on a CPU as the number of slots needs them, and answers do not depend on it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from phivision_jax.inference import weights
from phivision_jax.models import phivision
from phivision_jax.models.int8 import quantise_model
from phivision_jax.models.phivision import PhiVision
from tests.support.generation import generator_of, request_of

SAME = 1e-4
"""Between log-probabilities of two orders of the same sums."""


def in_bf16(model: PhiVision) -> PhiVision:
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.split()[1])
    return phivision.merge(phivision.abstract(model.config, dtype=jnp.bfloat16)[0], params)


def in_int8(model: PhiVision) -> PhiVision:
    copy = nnx.clone(model)
    quantise_model(copy)
    return copy


@pytest.mark.parametrize(
    ("convert", "slots", "held"),
    [
        (nnx.clone, 1, "float32"),
        (in_bf16, 2, "bfloat16"),
        (in_bf16, 3, "float32, outputs first"),
        (nnx.clone, 2, "float32, outputs first"),
        (in_int8, 4, "int8"),
        (in_int8, 17, "int8"),
    ],
)
def test_matrices_are_held_as_the_number_of_slots_needs(tiny, convert, slots, held):
    model = convert(tiny)
    placed, structure, dtype = weights.place(model, "cpu", slots)
    stacked = model.split()[1]["decoder"]
    layer = nnx.merge(structure, placed.layers[0])
    for one in (layer.mlp.down_proj, layer.self_attn.o_proj):
        assert f"{one.kernel[...].dtype}{', outputs first' if one.outputs_first else ''}" == held
    assert placed.model["decoder"]["lm_head"]["kernel"].dtype == layer.mlp.down_proj.kernel[...].dtype
    assert dtype == jnp.float32
    down = layer.mlp.down_proj.kernel[...]
    want = stacked["layers"]["mlp"]["down_proj"]["kernel"][0]
    np.testing.assert_array_equal(down.T if layer.mlp.down_proj.outputs_first else down, want)


def test_answers_in_bf16_do_not_depend_on_how_matrices_are_held(tiny):
    model, found = in_bf16(tiny), []
    request = request_of([7, 3, 56, 21, 30], max_new_tokens=12)
    for slots in (1, 2, 3):  # one row of three is computed at a time
        ((reply,),) = generator_of(model, slots=slots, cache_dtype="float32").generate([request])
        found.append(reply)
    assert len({reply.ids for reply in found}) == 1
    for reply in found[1:]:
        for one, other in zip(found[0].logprobs, reply.logprobs, strict=True):
            assert abs(one.logprob - other.logprob) < SAME
