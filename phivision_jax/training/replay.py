"""Repeat one step of a run: its batch, and the model's loss on each row. The run is not changed.

The state before the step is reconstructed as training made it: from the newest checkpoint before it, or from the run's
initial state, by repeating the steps between. So loss and gradients are the run's own, for skipped updates too.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from phivision_jax import sharding
from phivision_jax.batch import Batch
from phivision_jax.checkpoint.manager import RunCheckpoints
from phivision_jax.io.messages import shorten
from phivision_jax.io.progress import bar
from phivision_jax.models import phivision
from phivision_jax.training import loss, setup
from phivision_jax.training.run_config import RunConfig
from phivision_jax.training.run_directory import RunDirectory


def replay(cfg: RunConfig, run: str, number: int, log: Callable[[str], None] = print) -> dict[str, float]:
    """Repeat a step and report it. Each of several processes prints its own rows.

    Args:
      run: the run's directory, or ``gs://bucket/folder``.
      number: the step, from 1, as in ``metrics.jsonl`` and ``skipped.jsonl``.
      log: receives what concerns all processes.

    Returns:
      The step's scalar metrics.

    Raises:
      ValueError: when the run has no such step, or was started with other settings.
    """
    with RunDirectory(run, jax.process_index(), jax.process_count(), log, readonly=True) as directory:
        if not (directory.local / "plan").is_dir():
            raise ValueError(f"{directory.url} holds no plan: --replay needs the directory of a run that was started")
        prepared = setup.prepare(setup.check(cfg, run), directory)
        checkpoints = RunCheckpoints(directory.url, cfg.keep_checkpoints, log=log, create=False)
        step = prepared.step
        if not 1 <= number <= prepared.steps:
            raise ValueError(f"--replay={number}: the run's steps are 1 to {prepared.steps}")
        compiled = step.compile(prepared.feed.spec)
        replicated = sharding.replicated(step.mesh)  # a process can fetch values of its own devices only
        row_losses = jax.jit(_row_losses, static_argnums=0, out_shardings=replicated)
        state, _ = setup.start(prepared, checkpoints, log, at_most=number - 1)
        first = int(state["step"])
        with bar(f"to step {number}", number - first, shown=jax.process_index() == 0) as advance:
            for batch, info in prepared.feed.batches(first, number):
                placed = prepared.feed.place(batch)
                if info.step + 1 == number:
                    with step.in_force():
                        losses, weights = jax.device_get(row_losses(step.graphdef, state["params"], placed))
                state, metrics = compiled(state, placed)
                advance(1)
    del metrics["work"]
    host = {name: float(value) for name, value in jax.device_get(metrics).items() if np.ndim(value) == 0}
    update = "update skipped" if host["skipped_in_a_row"] or not host["weight"] else "update accepted"
    log(f"step {number} ({update}): loss {host['loss']:.6g}, gradient norm {host['grad_norm']:.6g}")
    log("  " + ", ".join(f"{name} {host[name]:.4g}" for name in host if name.startswith("grad_norm/")))
    process = f"process {jax.process_index()}: " if jax.process_count() > 1 else ""
    for name in ("loss_weights", "merge_weight"):
        if (values := getattr(batch, name)) is not None and (count := int((~np.isfinite(values)).sum())):
            print(f"  {process}{name} of the batch has {count:,} values that are not finite", flush=True)
    for b, ids in zip(prepared.feed.own_rows, info.record_ids, strict=True):
        found = f"loss {losses[b] / max(weights[b], 1e-9):.4g} over {weights[b]:g} target tokens"
        print(f"  {process}row {b}: {found}; {shorten(', '.join(ids), 400)}", flush=True)
    return host


def _row_losses(graphdef: nnx.GraphDef, params: phivision.Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Weighted loss and weight of each row, [B] each."""
    model = phivision.merge(graphdef, params)
    counted = jnp.ones(batch.targets.shape, bool)  # positions without a target too, so that NaNs there show
    losses, _ = loss.cross_entropy(model.hidden(batch), model.decoder.lm_head.kernel[...], batch.targets, counted)
    return (losses * batch.loss_weights).sum(1), batch.loss_weights.sum(1)
