"""train.py with something wrong, as the environment's TROUBLE says:

poison:3        inf among the loss weights of step 3, in one row of the first process
weight:decoder  the last parameter of this module is inf from the start
told:3          SIGTERM while step 3 is being taken, and again while it is being saved

All checkpoints take SLOW seconds (default: none) until their manifest is begun.
"""

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import jax
import numpy as np
from absl import app

import train
from phivision_jax.checkpoint import manifest
from phivision_jax.training import setup

kind, _, what = os.environ["TROUBLE"].partition(":")
sound_batches, sound_start, sound_seal = setup.Prepared.batches, setup.start, manifest.seal
told = False


def batches(made, first):
    for batch, info in sound_batches(made, first):
        if info.step + 1 == int(what) and jax.process_index() == 0:
            weights = np.array(batch.loss_weights)
            weights[0, np.flatnonzero(weights[0])[0]] = np.inf
            batch = batch._replace(loss_weights=weights)
        yield batch, info


def start(made, *args, **more):
    state, tail = sound_start(made, *args, **more)
    leaves, tree = jax.tree.flatten(state["params"][what])
    leaves[-1] = jax.jit(lambda x: x.at[0].set(np.inf), out_shardings=leaves[-1].sharding)(leaves[-1])
    return state | {"params": state["params"] | {what: jax.tree.unflatten(tree, leaves)}}, tail


def told_batches(made, first):
    global told
    for batch, info in sound_batches(made, first):
        if info.step + 1 == int(what):
            told = True
            os.kill(os.getpid(), signal.SIGTERM)
        yield batch, info


def seal(*args):
    if told:
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(float(os.environ.get("SLOW", 0)))
    sound_seal(*args)


manifest.seal = seal
if kind == "poison":
    setup.Prepared.batches = batches
elif kind == "told":
    setup.Prepared.batches = told_batches
else:
    setup.start = start
app.run(train.main, flags_parser=train.parse_flags)
