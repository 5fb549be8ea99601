"""Our side of ``step.py``: the step that ``train.py`` runs, in a separate process with the peer's protocol.

    {"do": "versions"}
    {"do": "load", "shape": "…", "devices": 2, "seed": 0}    a model of ``step_work`` and its initial weights
    {"do": "weights", "file": "x.npz"}    write them in the released layout
    {"do": "batches", "work": {…}}    make the batches of ``step_work.make_work``
    {"do": "start", "learning_rate": x}    reset weights, optimizer and compiled steps
    {"do": "steps", "name": "full"}    one step on every batch: seconds, CPU seconds, losses; compiles first
    {"do": "product", "sizes": [M, K, N], "times": n}    GFLOP/s of the fastest of n products of matrices

Weights, tokens and pixels follow from the seed, so that only the peer needs a file of weights.
"""

from __future__ import annotations

import dataclasses
import platform
import time
from typing import Any

import jax
import numpy as np
from peer_process import serve
from step_work import MODELS, OPTIMIZER, make_work

from phivision_jax import sharding
from phivision_jax.batch import Batch
from phivision_jax.data.feed.pipeline import to_device
from phivision_jax.training.run_config import ResolvedConfig
from phivision_jax.training.step import TrainStep, init_params, make_train_step
from tests.support.parameter_trees import hf_tensors


class Ours:
    """Rows and weights sharded over the devices, as in the recipe; one compilation per shape of batch."""

    def versions(self) -> dict[str, Any]:
        return {"python": platform.python_version(), "numpy": np.__version__, "jax": jax.__version__}

    def load(self, shape: str, devices: int, seed: int) -> dict[str, Any]:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", devices)  # before JAX starts its backend
        self.mesh = sharding.make_mesh({"fsdp": devices})
        keep = {"remat": "none", "vision_remat": "none", "microbatches": 1}  # like the peer, without recompute
        self.run = ResolvedConfig(model=MODELS[shape], dtype="float32", optim=OPTIMIZER, seed=seed, **keep)  # type: ignore[arg-type]
        self.params = jax.tree.map(np.asarray, init_params(self.run, self._step(0.0)))
        return {"parameters": sum(x.size for x in jax.tree.leaves(self.params))}

    def weights(self, file: str) -> dict[str, Any]:
        np.savez(file, **dict(hf_tensors(self.params, self.run.model)))  # type: ignore[arg-type]
        return {}

    def batches(self, work: dict[str, Any]) -> dict[str, Any]:
        prepared = make_work(**work)
        self.sets = {"full": prepared.full.ours, "packed": prepared.packed, "unpacked": prepared.unpacked.ours}
        return {}

    def start(self, learning_rate: float) -> dict[str, Any]:
        self.step = self._step(learning_rate)
        self.state = self.step.init(self.params)
        self.compiled: dict[tuple, Any] = {}
        self.placed: dict[str, list[Batch]] = {}
        return {}

    def steps(self, name: str) -> dict[str, Any]:
        if name not in self.placed:
            self.placed[name] = [self._prepared(batch) for batch in self.sets[name]]
        seconds, losses, cpu = [], [], time.process_time()
        for batch in self.placed[name]:
            start = time.perf_counter()
            self.state, metrics = self.compiled[_shape(batch)](self.state, batch)
            jax.block_until_ready(self.state)
            losses.append(float(metrics["loss"]))
            seconds.append(time.perf_counter() - start)
        return {"seconds": sum(seconds), "cpu_seconds": time.process_time() - cpu, "losses": losses}

    def product(self, sizes: list[int], times: int) -> dict[str, Any]:
        M, K, N = sizes
        left, right = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(((M, K), (K, N))))
        multiply, seconds = jax.jit(lambda a, b: a @ b), []
        for _ in range(times + 1):  # the first compiles
            start = time.perf_counter()
            jax.block_until_ready(multiply(left, right))
            seconds.append(time.perf_counter() - start)
        return {"gflops": 2 * M * K * N / min(seconds) / 1e9}

    def _step(self, learning_rate: float) -> TrainStep:
        optim = dataclasses.replace(self.run.optim, learning_rate=learning_rate)
        return make_train_step(dataclasses.replace(self.run, optim=optim), self.mesh, steps=1_000_000)

    def _prepared(self, batch: Batch) -> Batch:
        """Compile for the batch's shape, and put it on the devices."""
        if _shape(batch) not in self.compiled:
            self.compiled[_shape(batch)] = self.step.compile(batch)
        return to_device(batch, sharding.batch_shardings(self.mesh, batch), len(batch.tokens))


def _shape(batch: Batch) -> tuple:
    return (*batch.tokens.shape, *batch.patches.shape)


if __name__ == "__main__":
    serve(Ours())
