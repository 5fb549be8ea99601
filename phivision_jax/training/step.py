"""The training step: a pure function of (state, batch), jitted once, its state donated and its shardings pinned."""

import contextlib
import dataclasses
import functools
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
from phivision_jax.training import device_layout, guard, optim
from phivision_jax.training.loss import batch_loss
from phivision_jax.training.run_config import MeshConfig, OptimConfig, ResolvedConfig, RunConfig
from phivision_jax.training.telemetry.throughput import batch_work

type Compiled = Callable[[State, Batch], tuple[State, dict[str, Any]]]
State = dict[str, Any]
"""{"params": nested dict, "opt_state": of the trainable partition, "step": i32 scalar}."""


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """One model's training step on one mesh. It holds shapes only, no arrays."""

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
    """ShapeDtypeStructs with shardings."""

    @contextlib.contextmanager
    def in_force(self) -> Iterator[None]:
        """The mesh and the sharding rules for everything that is traced inside."""
        with jax.set_mesh(self.mesh), sharding.override_rules(self.rules):
            yield

    def batch_shardings(self, batch: Batch) -> Batch:
        """``sharding.batch_shardings`` on this mesh, with this run's rules."""
        with sharding.override_rules(self.rules):
            return sharding.batch_shardings(self.mesh, batch)

    @property
    def shardings(self) -> State:
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)

    def init(self, params: phivision.Params) -> State:
        """The initial state for these parameters, placed and sharded."""
        shardings = self.shardings

        def make(params):
            trainable, _ = optim.partition(params, self.cfg)
            return {"params": params, "opt_state": self.tx.init(trainable), "step": jnp.zeros((), jnp.int32)}

        params = jax.device_put(params, shardings["params"])
        return jax.jit(make, out_shardings=shardings)(params)

    def compile(self, batch: Batch) -> Compiled:
        """Compile for the shapes of this batch (``batch_spec``). The result accepts no other shape, so a run that
        completes has compiled once.

        Raises:
          ValueError: when the rows do not divide over the mesh and the microbatches.
        """
        return self.lower(batch).compile(compiler_options=compiler_options(self.mesh))

    def lower(self, batch: Batch) -> jax.stages.Lowered:
        """The step before compilation."""
        check_divisible("data.batch_rows", batch.tokens.shape[0], self.mesh, self.rules, self.microbatches)
        placed, metrics = sharding.abstract(batch, self.batch_shardings(batch)), sharding.replicated(self.mesh)
        with self.in_force():
            step = jax.jit(self.step, donate_argnums=0, out_shardings=(self.shardings, metrics))
            return step.lower(self.abstract_state, placed)

    def step(self, state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        """One update. Frozen parameters enter as constants, so their gradients are never computed."""
        trainable, frozen = optim.partition(state["params"], self.cfg)
        total_weight = batch.loss_weights.sum()

        def loss_of(trainable: dict, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
            model = phivision.merge(self.graphdef, optim.unflatten({**trainable, **frozen}))
            return batch_loss(model, batch, self.num_groups, total_weight)

        grad = functools.partial(jax.value_and_grad(loss_of, has_aux=True), trainable)
        (loss, aux), grads = sum_over_microbatches(grad, batch, self.microbatches, pin=self.pin)
        with jax.named_scope("optimizer"):
            facts = {"loss": loss, "weight": total_weight, "step": state["step"]}
            updates, opt_state = self.tx.update(grads, state["opt_state"], trainable, **facts)
            params = optim.unflatten({**optax.apply_updates(trainable, updates), **frozen})
        metrics = {"loss": loss, **aux, "work": batch_work(batch)}
        metrics |= {"skipped_in_a_row": opt_state.skipped_in_a_row, "skipped": opt_state.skipped}
        for name, tree in (("grad_norm", grads), ("update_norm", updates)):
            metrics |= {name: optax.global_norm(tree), **optim.module_norms(tree, name)}
        return {"params": params, "opt_state": opt_state, "step": state["step"] + 1}, metrics

    def pin(self, value_and_grads: Any) -> Any:
        """Constrain gradients to the shardings of their parameters: replicated ones would not fit."""
        value, grads = value_and_grads
        shardings = optim.flatten(self.shardings["params"])
        return value, {path: jax.lax.with_sharding_constraint(grad, shardings[path]) for path, grad in grads.items()}


def check_divisible(name: str, rows: int, mesh: Mesh, rules: Mapping[str, sharding.MeshAxes], parts: int = 1) -> None:
    """Check that a number of rows divides over the slice, data and fsdp axes, and into microbatches.

    Raises:
      ValueError: when it does not; the message begins with the setting's name.
    """
    with sharding.override_rules(rules):
        shards = sharding.num_shards(mesh, "batch")
    if rows % (unit := shards * parts):
        cause = f"does not divide over {shards} devices (mesh axes slice, data and fsdp)"
        cause += f" x {parts} microbatches" * (parts > 1)
        raise ValueError(f"{name} is {rows}, which {cause}; use a multiple of {unit}, or set mesh.fsdp")


def sum_over_microbatches[T](
    function: Callable[[Batch], T], batch: Batch, count: int, pin: Callable[[T], T] = lambda tree: tree
) -> T:
    """Σ ``function(part)`` over ``count`` parts of a batch, one after the other.

    Args:
      pin: constrains the shardings of a result and of the sum.
    """
    if count == 1:
        return function(batch)
    parts = microbatches(batch, count)
    like = jax.eval_shape(function, jax.tree.map(lambda x: x[0], parts))
    zeros = pin(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like))
    return jax.lax.scan(lambda sums, part: (jax.tree.map(jnp.add, sums, pin(function(part))), None), zeros, parts)[0]


def microbatches(batch: Batch, count: int) -> Batch:
    """[B, …] as [count, B / count, …]; row b is in part b mod count, so that every device keeps its own rows."""

    def split(x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)
        return sharding.constrain(x, None, "batch")

    return jax.tree.map(split, batch)


def make_train_step(cfg: RunConfig, mesh: Mesh, steps: int, num_groups: int = 1) -> TrainStep:
    """Derive the step from the configuration, without allocating a parameter.

    Automatic values (remat, microbatches) are chosen for the mesh's devices (``device_layout.py``).
    """
    cfg = device_layout.resolve(dataclasses.replace(cfg, mesh=MeshConfig(**mesh.shape)), list(mesh.devices.flat))
    graphdef, state = phivision.abstract(
        cfg.model, dtype=jnp.dtype(cfg.dtype), remat=cfg.remat, vision_remat=cfg.vision_remat, lora=cfg.lora
    )
    replicated = sharding.replicated(mesh)
    with sharding.override_rules(cfg.rules):
        params = sharding.abstract(nnx.to_pure_dict(state), sharding.param_shardings(state, mesh))
    tx = guard.guarded(optim.make_optimizer(params, cfg.optim, steps), cfg.guard)
    opt_state = optim.abstract_opt_state(tx, optim.partition(params, cfg.optim)[0], replicated)
    number = jax.ShapeDtypeStruct((), np.int32, sharding=replicated)
    abstract_state = {"params": params, "opt_state": opt_state, "step": number}
    rate = optim.schedule(cfg.optim, steps)
    return TrainStep(graphdef, tx, cfg.optim, rate, num_groups, cfg.microbatches, mesh, cfg.rules, abstract_state)


def init_params(cfg: ResolvedConfig, step: TrainStep, base: phivision.Params | None = None) -> phivision.Params:
    """Random parameters, created on the devices that hold them; the same numbers on any mesh.

    Args:
      base: parameters of a checkpoint (``lora.without``); only those that it lacks are random, the adapters, with the
        same numbers as without a checkpoint.
    """
    given = optim.flatten(base or {})
    shardings = {path: s for path, s in optim.flatten(step.shardings["params"]).items() if path not in given}

    def make():
        params = optim.flatten(phivision.PhiVision(cfg.model, rngs=nnx.Rngs(cfg.seed), lora=cfg.lora).split()[1])
        return {path: params[path] for path in shardings}

    return optim.unflatten({**given, **(jax.jit(make, out_shardings=shardings)() if shardings else {})})
