"""Compile a decoding program with int8 weights for a TPU that is not attached; print what it holds and copies.

``python -m tests.support.int8_decode``: a process of its own, as the TPU compiler may abort it.
"""

import dataclasses
import json

import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies

from phivision_jax import sharding
from phivision_jax.inference.engine import Engine
from phivision_jax.models import phivision
from phivision_jax.preflight.hlo import parse
from phivision_jax.preflight.traffic import large_results
from tests.support.batches import TINY

WIDE = dataclasses.replace(
    TINY.decoder, vocab_size=32_768, hidden_size=4096, intermediate_size=20_480, num_heads=32, num_kv_heads=2
)
CONFIG = dataclasses.replace(TINY, decoder=WIDE)
MATRIX = 4096 * 20_480
"""Numbers in a matrix of the MLP: in bf16 they do not fit into the chip's vector memory, which is no temporary."""


def compiled() -> tuple[int, list[str]]:
    """Bytes of temporaries, and the instructions whose results are as large as the keys of a layer of the cache."""
    mesh = sharding.make_mesh({}, topologies.get_topology_desc("v5e:2x2", "tpu").devices[:1])
    graphdef, state = phivision.abstract(CONFIG, dtype=jnp.bfloat16, weights="int8")
    params = sharding.abstract(nnx.to_pure_dict(state), sharding.param_shardings(state, mesh), jnp.bfloat16)
    model = phivision.merge(graphdef, params)
    engine = Engine(model, slots=64, length=2048, chunk=128, pool=64, cache_dtype=jnp.bfloat16)
    shape = next(shape for shape in engine.shapes() if shape.program == "decode")
    program = engine.lower(shape, engine.example_arguments(shape)).compile()
    keys = engine.state.cache.k
    layer = keys.size // keys.shape[0] * keys.dtype.itemsize
    return program.memory_analysis().temp_size_in_bytes, large_results(parse(program.as_text()), layer)


if __name__ == "__main__":
    print(json.dumps(compiled()))
