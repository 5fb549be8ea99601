"""Models loaded on several devices: a model that one of them could not hold answers as on one device."""

from __future__ import annotations

from collections import Counter

import jax
import numpy as np
import pytest

import phivision_jax
from tests.support.batches import TINY
from tests.support.checkpoints import save_checkpoint
from tests.support.generation import encoded, generator_of, random_image, request_of


@pytest.fixture(scope="module")
def checkpoint(tiny, tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("loading") / "checkpoint", tiny.split()[1], TINY)


def bytes_by_device(model) -> Counter:
    held: Counter = Counter()
    for leaf in jax.tree.leaves(model.split()[1]):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return held


def test_model_larger_than_a_device_is_sharded_and_answers_the_same(checkpoint):
    alone, _ = phivision_jax.load(checkpoint, mesh={"fsdp": 1})
    sharded, _ = phivision_jax.load(checkpoint)
    (total,) = bytes_by_device(alone).values()
    limit, held = total // 4, bytes_by_device(sharded)
    assert len(held) == 8 and max(held.values()) <= limit

    images = [[], encoded(TINY, [random_image((6, 8), 0)]), []]
    ids = [[1, 2, 3], [4, -200, 5, 6], [7, 8, 9, 10, 11, 12]]
    requests = [
        request_of(i, p, max_new_tokens=5, temperature=0.7, logprobs=0) for i, p in zip(ids, images, strict=True)
    ]
    small = {"slots": 1, "length": 128}
    (want, got) = (generator_of(model, **small).generate(requests) for model in (alone, sharded))
    for (a,), (b,) in zip(want, got, strict=True):  # three prompts on four groups
        assert a.ids == b.ids and len(a.ids) == 5
        np.testing.assert_allclose([t.logprob for t in a.logprobs], [t.logprob for t in b.logprobs], atol=1e-5)


def test_load_takes_sizes_of_the_axes(checkpoint):
    model, _ = phivision_jax.load(checkpoint, mesh={"fsdp": 2, "tensor": 2})
    assert len(bytes_by_device(model)) == 4


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"fsdp": 16}, "mesh fsdp 16 needs 16 devices, but there are 8"),
        ({"fsdp": 0}, "mesh axis fsdp is 0; sizes are at least 1"),
        ({"data": -1}, "mesh axis data is -1; sizes are at least 1"),
        ({"rows": 8}, "mesh axis 'rows' does not exist"),
        ({"tensor": 5}, "does not divide over mesh axes"),
    ],
)
def test_load_rejects_sizes(checkpoint, sizes, message):
    with pytest.raises(ValueError, match=message):
        phivision_jax.load(checkpoint, mesh=sizes)
