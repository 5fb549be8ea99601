"""One of two processes in a test of checkpoints: ``python saving_host.py ADDRESS NUMBER RUN save|restore``.

Each has two devices; arrays lie over all four. Prints what it is told and which step it got.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.damage import make_state, make_tail
from phivision_jax.checkpoint import loading
from phivision_jax.checkpoint.layout import CHECKPOINTS
from phivision_jax.checkpoint.manager import RunCheckpoints

STEPS = (10, 20, 30)


def main(address: str, number: str, folder: str, what: str) -> None:
    jax.distributed.initialize(address, num_processes=2, process_id=int(number))
    logging.getLogger("absl").setLevel(logging.ERROR)
    mesh = jax.make_mesh((4,), ("fsdp",), devices=jax.devices())

    def at(x):
        return NamedSharding(mesh, PartitionSpec(None, "fsdp") if np.ndim(x) > 1 else PartitionSpec())

    def place(tree):
        return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, at(x), np.asarray(x).__getitem__), tree)

    run = Path(folder)
    checkpoints = RunCheckpoints(run, keep=3, keep_best="accuracy", say=print)
    if what == "save":
        for step in STEPS:
            metrics = {"accuracy": 1.0}
            checkpoints.save(place(make_state(step)), place(make_tail()), {"model": {}}, run / "assets", metrics)
    else:
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at(x)), make_state(0))
        tail = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at(x)), make_tail())
        try:
            loading.restore_params(run / CHECKPOINTS / "20", target["params"])
        except ValueError as error:
            print("refused:", error)
        state, _, meta = checkpoints.restore(target, tail)
        print("restored", meta["step"], int(state["step"]))
        checkpoints.save(place(make_state(40)), place(make_tail()), {"model": {}}, run / "assets")
    checkpoints.close()


main(*sys.argv[1:])
