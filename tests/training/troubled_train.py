"""train.py with something wrong, as the environment's TROUBLE says:

poison:3        inf among the loss weights of step 3, in one row of the first process
weight:decoder  the last parameter of this module is inf from the start
"""

import dataclasses
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import jax
import numpy as np
from absl import app

import train
from phivision_jax.training import setup

kind, _, what = os.environ["TROUBLE"].partition(":")
sound_batches, sound_start = setup.Prepared.batches, setup.start


def batches(made, first):
    for batch, info in sound_batches(made, first):
        if info.step + 1 == int(what) and jax.process_index() == 0:
            weights = np.array(batch.loss_weights)
            weights[0, np.flatnonzero(weights[0])[0]] = np.inf
            batch = dataclasses.replace(batch, loss_weights=weights)
        yield batch, info


def start(made, *args, **more):
    state, tail = sound_start(made, *args, **more)
    leaves, tree = jax.tree.flatten(state["params"][what])
    leaves[-1] = jax.jit(lambda x: x.at[0].set(np.inf), out_shardings=leaves[-1].sharding)(leaves[-1])
    return state | {"params": state["params"] | {what: jax.tree.unflatten(tree, leaves)}}, tail


if kind == "poison":
    setup.Prepared.batches = batches
else:
    setup.start = start
app.run(train.main, flags_parser=train.parse_flags)
