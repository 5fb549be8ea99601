"""The training step: a pure function of (state, batch), jitted once, its state donated and its shardings pinned."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from phivision_jax import sharding
from phivision_jax.batch import Batch
from phivision_jax.hardware.compiler_options import compiler_options
from phivision_jax.models import phivision
from phivision_jax.training import device_layout, optim
from phivision_jax.training.guard import guarded
from phivision_jax.training.loss import batch_loss
from phivision_jax.training.run_config import MeshConfig, OptimConfig, RunConfig
from phivision_jax.training.telemetry.module_norms import module_norms
from phivision_jax.training.telemetry.throughput import batch_work

State = dict[str, Any]
"""{"params": nested dict, "opt_state": of the trainable partition, "step": i32 scalar}."""


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """How to train one model on one mesh. Shapes first: nothing here holds an array."""

    graphdef: nnx.GraphDef
    tx: optax.GradientTransformationExtraArgs
    cfg: OptimConfig
    learning_rate: optax.Schedule
    num_groups: int
    microbatches: int
    mesh: Mesh
    rules: Mapping[str, sharding.MeshAxes]
    """The run's changes to ``sharding.RULES``."""
    abstract_state: State
    """ShapeDtypeStructs that carry the shardings."""

    @contextlib.contextmanager
    def in_force(self) -> Iterator[None]:
        """The mesh and the sharding rules for everything that is traced inside."""
        with jax.set_mesh(self.mesh), sharding.override_rules(self.rules):
            yield

    def batch_shardings(self, batch: Batch) -> Batch:
        """``sharding.batch_shardings`` on this mesh, by this run's rules."""
        with sharding.override_rules(self.rules):
            return sharding.batch_shardings(self.mesh, batch)

    @property
    def shardings(self) -> State:
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)

    def init(self, params: phivision.Params) -> State:
        """The state around these parameters, placed and sharded."""
        shardings = self.shardings

        def make(params):
            trainable, _ = optim.partition(params, self.cfg)
            return {"params": params, "opt_state": self.tx.init(trainable), "step": jnp.zeros((), jnp.int32)}

        params = jax.device_put(params, shardings["params"])
        return jax.jit(make, out_shardings=shardings)(params)

    def compile(self, batch: Batch) -> Callable[[State, Batch], tuple[State, dict[str, jax.Array]]]:
        """Compile for this batch's shapes (``batch_spec``). The result refuses any other shape, so a run that gets
        through has compiled once.

        Raises:
          ValueError: when the rows do not divide over the mesh and the microbatches.
        """
        return self.lower(batch).compile(compiler_options=compiler_options(self.mesh))

    def lower(self, batch: Batch) -> jax.stages.Lowered:
        """The step before it is compiled."""
        with sharding.override_rules(self.rules):
            shards = sharding.num_shards(self.mesh, "batch")
        rows, unit = batch.tokens.shape[0], self.microbatches * shards
        if rows % unit:
            raise ValueError(
                f"data.batch_rows is {rows}, which does not divide over {shards} devices (mesh axes "
                f"slice, data and fsdp) x {self.microbatches} microbatches; take a multiple of {unit}"
            )
        placed, metrics = sharding.abstract(batch, self.batch_shardings(batch)), sharding.replicated(self.mesh)
        with self.in_force():
            step = jax.jit(self.step, donate_argnums=0, out_shardings=(self.shardings, metrics))
            return step.lower(self.abstract_state, placed)

    def step(self, state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        """One update. Frozen parameters enter as constants: no gradient of theirs is ever computed."""
        trainable, frozen = optim.partition(state["params"], self.cfg)
        total_weight = batch.loss_weights.sum()

        def loss_of(trainable: dict, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
            model = phivision.merge(self.graphdef, optim.unflatten({**trainable, **frozen}))
            return batch_loss(model, batch, self.num_groups, total_weight)

        grad = jax.value_and_grad(loss_of, has_aux=True)
        if self.microbatches == 1:
            (loss, aux), grads = grad(trainable, batch)
        else:

            def add(sums: Any, part: Batch) -> tuple[Any, None]:
                return jax.tree.map(jnp.add, sums, self.pin(grad(trainable, part))), None

            parts = microbatches(batch, self.microbatches)
            like = jax.eval_shape(grad, trainable, jax.tree.map(lambda x: x[0], parts))
            zeros = self.pin(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like))
            ((loss, aux), grads), _ = jax.lax.scan(add, zeros, parts)
        with jax.named_scope("optimizer"):
            updates, opt_state = self.tx.update(grads, state["opt_state"], trainable, loss=loss, step=state["step"])
            params = optim.unflatten({**optax.apply_updates(trainable, updates), **frozen})
        metrics = {
            "loss": loss,
            **aux,
            **batch_work(batch),
            "grad_norm": optax.global_norm(grads),
            "update_norm": optax.global_norm(updates),
            **module_norms(grads, "grad_norm"),
            **module_norms(updates, "update_norm"),
            "skipped_in_a_row": opt_state.skipped_in_a_row,
            "skipped": opt_state.skipped,
        }
        return {"params": params, "opt_state": opt_state, "step": state["step"] + 1}, metrics

    def pin(self, value_and_grads: Any) -> Any:
        """The same, gradients kept where their parameters are: a whole one on every device would not fit."""
        value, grads = value_and_grads
        at = optim.flatten(self.shardings["params"])
        return value, {path: jax.lax.with_sharding_constraint(grad, at[path]) for path, grad in grads.items()}


def microbatches(batch: Batch, count: int) -> Batch:
    """[B, …] as [count, B / count, …], every device's own rows dealt out: row b is in part b mod count."""

    def split(x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)
        return sharding.constrain(x, None, "batch")

    return jax.tree.map(split, batch)


def make_train_step(cfg: RunConfig, mesh: Mesh, steps: int, num_groups: int = 1) -> TrainStep:
    """Everything that follows from the configuration, without allocating a parameter.

    What it leaves open (remat, microbatches) follows from the mesh's devices (``device_layout.py``).
    """
    cfg = device_layout.resolve(dataclasses.replace(cfg, mesh=MeshConfig(**mesh.shape)), list(mesh.devices.flat))
    graphdef, state = phivision.abstract(
        cfg.model, dtype=jnp.dtype(cfg.dtype), remat=cfg.remat, vision_remat=cfg.vision_remat, lora=cfg.lora
    )
    with sharding.override_rules(cfg.rules):
        params, at = nnx.to_pure_dict(state), sharding.param_shardings(state, mesh)
    tx = guarded(optim.make_optimizer(params, cfg.optim, steps), cfg.guard)
    trainable, _ = optim.partition(params, cfg.optim)
    flat_at = optim.flatten(at)
    opt_at = optim.optimizer_shardings(
        tx, trainable, {path: flat_at[path] for path in trainable}, sharding.replicated(mesh)
    )
    shapes = {
        "params": params,
        "opt_state": jax.eval_shape(tx.init, trainable),
        "step": jax.ShapeDtypeStruct((), np.int32),
    }
    shardings = {"params": at, "opt_state": opt_at, "step": sharding.replicated(mesh)}
    abstract_state, rate = sharding.abstract(shapes, shardings), optim.schedule(cfg.optim, steps)
    return TrainStep(graphdef, tx, cfg.optim, rate, num_groups, cfg.microbatches, mesh, cfg.rules, abstract_state)


def init_params(cfg: RunConfig, step: TrainStep, base: phivision.Params | None = None) -> phivision.Params:
    """Random parameters, made where they will live (the same numbers on any mesh).

    Args:
      base: parameters to take instead of random ones, as a checkpoint has them (``lora.without``): then only those it
        lacks are made, the adapters, and they are the ones that a start from nothing would have made.
    """
    given = optim.flatten(base or {})
    at = {path: at for path, at in optim.flatten(step.shardings["params"]).items() if path not in given}

    def make():
        params = optim.flatten(phivision.PhiVision(cfg.model, rngs=nnx.Rngs(cfg.seed), lora=cfg.lora).split()[1])
        return {path: params[path] for path in at}

    return optim.unflatten({**given, **(jax.jit(make, out_shardings=at)() if at else {})})
