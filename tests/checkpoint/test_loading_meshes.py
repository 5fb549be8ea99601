"""Models loaded on several devices: a model that one of them could not hold answers as on one device."""

from __future__ import annotations

from collections import Counter

import jax
import numpy as np
import pytest
from PIL import Image

import phivision_jax
from phivision_jax.inference.generate import generate_ids
from phivision_jax.rows import batch_from_ids
from tests.support.batches import TINY
from tests.support.checkpoints import save_checkpoint


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

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 6, 3), np.uint8))
    ids, images = [[1, 2, 3], [4, -200, 5, 6], [7, 8, 9, 10, 11, 12]], [[], [image], []]
    settings = {"max_new_tokens": 5, "eos_id": None, "temperature": 0.7}
    batch = batch_from_ids(ids, images, config=TINY, length=16, num_patches=16)
    want = generate_ids(alone, batch, **settings)
    np.testing.assert_array_equal(generate_ids(sharded, batch, **settings), want)  # three rows on four groups
    first = jax.tree.map(lambda x: x[:1], batch)
    np.testing.assert_array_equal(generate_ids(sharded, first, **settings), want[:1])


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
