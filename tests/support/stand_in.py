"""A small stand-in for a run, for tests with real processes: ``python stand_in.py --run DIR --steps N …``.

Its state is an array over all devices of all processes, a step multiplies it (a collective in every step) and it saves
like a run does. ``--trouble`` has something happen to one process at one step:

    error    it raises                  hang     it sleeps
    exit     os._exit(3)                frozen   it sleeps and keeps Python's lock
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from phivision_jax.checkpoint.manager import RunCheckpoints
from phivision_jax.distributed.heartbeat import LONG_S, PREEMPTED, Watchdog
from phivision_jax.distributed.processes import Preemption, first_error, initialize, on_process_zero, propagate_failure
from phivision_jax.io import jsonl
from phivision_jax.training.run import truncate_logs
from phivision_jax.training.telemetry.metrics import MetricsWriter


def main(args: argparse.Namespace) -> None:
    run, me = args.run, jax.process_index()
    watchdog = Watchdog(run, args.limit, me)
    mesh = jax.make_mesh((jax.device_count(),), ("fsdp",), devices=jax.devices())
    sharded = NamedSharding(mesh, PartitionSpec("fsdp"))
    one = NamedSharding(mesh, PartitionSpec())

    def make_assets() -> None:
        (run / "assets").mkdir(parents=True, exist_ok=True)
        (run / "assets" / "tokenizer.json").write_text("{}")

    on_process_zero("assets", make_assets)
    checkpoints = RunCheckpoints(run, keep=2)
    size = 32  # of any mesh here
    array = jax.ShapeDtypeStruct((size,), jnp.float32, sharding=sharded)
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=one)
    shapes = {"params": {"w": array}, "opt_state": {"m": array}, "step": number}
    tail = {"probe": jax.ShapeDtypeStruct((4,), jnp.float32, sharding=one)}

    def init():
        params = {"w": jnp.linspace(0.5, 1.5, size)}
        return {"params": params, "opt_state": {"m": jnp.zeros(size)}, "step": jnp.int32(0)}, {"probe": jnp.ones(4)}

    def step(state, batch):
        w, m = state["params"]["w"], state["opt_state"]["m"]
        loss = jnp.mean(jnp.sin(w * batch))
        m = 0.9 * m + jnp.cos(w * batch) * loss
        return {"params": {"w": w - 0.01 * m}, "opt_state": {"m": m}, "step": state["step"] + 1}, loss

    shardings = jax.tree.map(lambda x: x.sharding, shapes)
    watchdog.alive("compiling", LONG_S)
    compiled = jax.jit(step, donate_argnums=0, out_shardings=(shardings, one)).lower(
        shapes, jax.ShapeDtypeStruct((), jnp.float32, sharding=one)
    ).compile()  # fmt: skip
    watchdog.alive("restoring", LONG_S)
    if not checkpoints.steps():
        state, tail = jax.jit(init, out_shardings=(shardings, jax.tree.map(lambda x: x.sharding, tail)))()
    else:
        state, tail, _ = checkpoints.restore(shapes, tail)
    first = int(state["step"])
    writer = MetricsWriter(run, first) if me == 0 else None
    on_process_zero("logs", lambda: truncate_logs(run, first))
    where = f"process {me} of {jax.process_count()}"
    message = first_error(f"{where} has an error" if me == jax.process_count() - 1 else None)
    print(f"{where} hears: {message}", flush=True)
    time.sleep(args.slow_start)
    print(f"{where}: continuing from step {first}" if first else f"{where}: begins", flush=True)
    stop = False
    with Preemption(first) as preemption:
        for done in range(first + 1, args.steps + 1):
            if args.trouble and (done, me) == (args.at_step, args.at_process):
                watchdog.alive("data", step=done)
                trouble(args.trouble)
            ids = [[f"synthetic:{done * 7919 % 1000}"]]
            jsonl.append(run / f"records_{me}.jsonl", {"step": done, "ids": ids})
            batch = jax.device_put(np.float32(1 + done % 5), one)
            state, loss = compiled(state, batch)
            watchdog.alive("step", step=done)
            value = float(loss)
            if writer:
                writer.write(done, {"loss": value})
            time.sleep(args.pause)
            stop = preemption.reached(done)
            if done % args.checkpoint_every == 0 or done == args.steps or stop:
                watchdog.alive("saving", LONG_S, step=done)
                checkpoints.save(state, tail, {"model": {}, "run": {}}, run / "assets")
            if stop:
                break
    watchdog.alive("closing", LONG_S)
    checkpoints.close()
    watchdog.close()
    if stop:
        print(f"{where}: asked to stop, saved step {done}", flush=True)
        sys.exit(PREEMPTED)


def trouble(what: str) -> None:
    if what == "error":
        raise ValueError("the disk is full\nand more lines")
    if what == "hang":
        time.sleep(1000)
    if what == "frozen":
        ctypes.PyDLL(None).sleep(1000)  # PyDLL: without giving up the lock
    if what == "exit":
        os._exit(3)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--checkpoint-every", type=int, default=5)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--slow-start", type=float, default=0.0)
    parser.add_argument("--limit", type=float, default=60.0)
    parser.add_argument("--trouble", default="")
    parser.add_argument("--at-step", type=int, default=0)
    parser.add_argument("--at-process", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    args = parse()
    initialize()
    with propagate_failure("stand_in.py", (ValueError,)):
        main(args)
