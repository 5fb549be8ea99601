"""One of two processes in a test of checkpoints: ``python saving_host.py ADDRESS NUMBER RUN save|restore``.

Each has two devices; arrays are sharded over all four. When restoring, the second process cannot read step 30. Prints
the messages and the restored step.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec

from phivision_jax.checkpoint import loading
from phivision_jax.checkpoint.layout import CHECKPOINTS
from phivision_jax.checkpoint.manager import RunCheckpoints
from phivision_jax.config import ModelConfig
from phivision_jax.convert import ours
from phivision_jax.convert.mapping import Leaf
from tests.support.damage import make_state, make_tail

STEPS = (10, 20, 30)
SIZES = {"D": 16, "F": 40, "V": 64}
LEAVES = [
    Leaf("decoder/layers/up_proj/kernel", ("0", "1", "2"), "F D -> D F", SIZES, stacked=True),
    Leaf("decoder/layers/norm/scale", ("0", "1", "2"), "D -> D", SIZES, stacked=True),
    Leaf("decoder/lm_head/kernel", ("head",), "V D -> V D", SIZES),
]
"""The arrays of ``make_state`` as rows of tensors; no process has all rows of one on its devices."""
restore = ocp.PyTreeCheckpointHandler.restore


def fail_at_30(handler, directory, *args, **kwargs):
    if directory.parent.name == "30":
        raise ValueError("unreadable in one process")
    return restore(handler, directory, *args, **kwargs)


def main(address: str, number: str, folder: str, action: str) -> None:
    jax.distributed.initialize(address, num_processes=2, process_id=int(number))
    logging.getLogger("absl").setLevel(logging.ERROR)
    mesh = jax.make_mesh((4,), ("fsdp",), devices=jax.devices())

    def placement(x):
        largest = max(np.shape(x), default=0)
        return NamedSharding(mesh, PartitionSpec(*["fsdp" if size == largest else None for size in np.shape(x)]))

    def place(tree):
        return jax.tree.map(
            lambda x: jax.make_array_from_callback(x.shape, placement(x), np.asarray(x).__getitem__), tree
        )

    run = Path(folder)
    checkpoints = RunCheckpoints(run, keep=3, keep_best="accuracy", log=print)
    if action == "save":
        for step in STEPS:
            metrics = {"accuracy": 1.0}
            checkpoints.save(place(make_state(step)), place(make_tail()), {"model": {}}, run / "assets", metrics)
    else:
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placement(x)), make_state(0))
        tail = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placement(x)), make_tail())
        if number == "1":
            ocp.PyTreeCheckpointHandler.restore = fail_at_30
        loading.model_leaves, ours.BLOCK_BYTES = lambda config: LEAVES, 1
        try:
            loading.read_params(run / CHECKPOINTS / "20", ModelConfig(), target["params"])
        except ValueError as error:
            print("refused:", error)
        state, _, meta = checkpoints.restore(target, tail)
        print("restored", meta["step"], int(state["step"]))
        checkpoints.save(place(make_state(40)), place(make_tail()), {"model": {}}, run / "assets")
    checkpoints.close()


main(*sys.argv[1:])
