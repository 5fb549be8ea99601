"""``phivision train`` with a fault, as the environment variable TROUBLE describes it:

poison:3        inf among the loss weights of step 3, in one row of the first process
weight:decoder  the last parameter of this module is inf from the start
term:3          SIGTERM while step 3 is computed, and again while it is saved

SLOW: seconds that every save takes longer (default 0).
IMPATIENT: seconds after which an unresponsive bucket is given up, and between two pushes of the log; requests of the
main thread to the bucket that fail are printed.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import fsspec.asyn
import jax
import numpy as np
import orbax.checkpoint as ocp

from phivision_jax.cli.main import main
from phivision_jax.training import run_directory, setup
from phivision_jax.training.train_data import Feed

kind, _, what = os.environ.get("TROUBLE", "").partition(":")
sound_batches, sound_start, finalize = Feed.batches, setup.start, ocp.CheckpointManager._finalize
sound_sync, terminated = fsspec.asyn.sync, False


def poisoned_batches(feed, first, last, **more):
    for batch, info in sound_batches(feed, first, last, **more):
        if info.step + 1 == int(what) and jax.process_index() == 0:
            weights = np.array(batch.loss_weights)
            weights[0, np.flatnonzero(weights[0])[0]] = np.inf
            batch = batch._replace(loss_weights=weights)
        yield batch, info


def broken_start(prepared, *args, **more):
    state, tail = sound_start(prepared, *args, **more)
    leaves, tree = jax.tree.flatten(state["params"][what])
    leaves[-1] = jax.jit(lambda x: x.at[0].set(np.inf), out_shardings=leaves[-1].sharding)(leaves[-1])
    return state | {"params": state["params"] | {what: jax.tree.unflatten(tree, leaves)}}, tail


def terminating_batches(feed, first, last, **more):
    global terminated
    for batch, info in sound_batches(feed, first, last, **more):
        if info.step + 1 == int(what):
            terminated = True
            os.kill(os.getpid(), signal.SIGTERM)
        yield batch, info


def sync_and_report(*args, **more):
    try:
        return sound_sync(*args, **more)
    except Exception as error:
        if threading.current_thread() is threading.main_thread() and not isinstance(error, FileNotFoundError):
            print(f"trouble: a request of the main thread failed: {error!r:.200}", file=sys.stderr)
        raise


def finalize_slowly(*args):
    if terminated:
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(float(os.environ.get("SLOW", 0)))
    finalize(*args)


ocp.CheckpointManager._finalize = finalize_slowly
if kind == "poison":
    Feed.batches = poisoned_batches
elif kind == "term":
    Feed.batches = terminating_batches
elif kind == "weight":
    setup.start = broken_start
if patience := os.environ.get("IMPATIENT"):
    run_directory.PATIENCE_S = run_directory.PUSH_S = float(patience)
    fsspec.asyn.sync = sync_and_report
main(["train", *sys.argv[1:]])
