"""One step of a run once more: what was in its batch, and what the model made of each row. The run stays as it was.

The state before the step is made as training made it: from the newest checkpoint that is not newer (the run's very
beginning, where none is old enough) by taking the steps between. So the step's loss and gradients are the run's own,
also those of a step that was not taken.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from phivision_jax import sharding
from phivision_jax.batch import Batch
from phivision_jax.checkpoint.manager import RunCheckpoints
from phivision_jax.data.feed.pipeline import rows_of_process
from phivision_jax.io.progress import bar
from phivision_jax.models import phivision
from phivision_jax.training import setup
from phivision_jax.training.loss import cross_entropy
from phivision_jax.training.run_config import RunConfig
from phivision_jax.training.run_directory import RunDirectory


def replay(cfg: RunConfig, run: str, number: int, say: Callable[[str], None] = print) -> dict[str, float]:
    """Take a step again and say what came of it. Of several processes, each prints what is in its own rows.

    Args:
      run: the run's directory, or its place in a bucket.
      number: of the step, from 1, as in ``metrics.jsonl`` and ``skipped.jsonl``.
      say: told what is of the whole step.

    Returns:
      The step's scalar metrics.

    Raises:
      ValueError: when the run has no such step, or was started with other settings.
    """
    with RunDirectory(run, jax.process_index(), jax.process_count(), say, keeps=False) as directory:
        return _replay(cfg, directory, number, say)


def _replay(cfg: RunConfig, directory: RunDirectory, number: int, say: Callable[[str], None]) -> dict[str, float]:
    if not (directory.local / "plan").is_dir():
        raise ValueError(
            f"{directory.url} is not a run's directory (it holds no plan): --replay looks at a run that was started"
        )
    checkpoints = RunCheckpoints(directory.url, cfg.keep_checkpoints, say=say)
    made = setup.prepare(cfg, directory, checkpoints)
    if not 1 <= number <= made.steps:
        raise ValueError(f"--replay={number}: the run's steps are 1 to {made.steps}")
    compiled = made.step.compile(made.spec)
    everywhere = sharding.replicated(made.step.mesh)  # a process can fetch its own devices' values alone
    row_losses = jax.jit(lambda params, batch: _row_losses(made.step.graphdef, params, batch), out_shardings=everywhere)
    state, _ = setup.start(made, checkpoints, say, at_most=number - 1)
    first = int(state["step"])
    with bar(f"to step {number}", number - first, shown=jax.process_index() == 0) as advance:
        for batch, info in made.batches(first):
            placed = made.place(batch)
            if info.step + 1 == number:
                with made.step.in_force():
                    losses, weights = jax.device_get(row_losses(state["params"], placed))
            state, metrics = compiled(state, placed)
            advance(1)
            if info.step + 1 == number:
                break
    host = {name: float(value) for name, value in jax.device_get(metrics).items() if np.ndim(value) == 0}
    taken = "not taken" if host["skipped_in_a_row"] else "taken"
    say(f"step {number} ({taken}): loss {host['loss']:.6g}, gradient norm {host['grad_norm']:.6g}")
    say("  " + ", ".join(f"{name} {host[name]:.4g}" for name in host if name.startswith("grad_norm/")))
    here = rows_of_process(made.step.batch_shardings(made.spec).tokens, made.cfg.data.batch_rows)
    who = f"process {jax.process_index()}: " if jax.process_count() > 1 else ""
    for name, bad in _not_finite(batch).items():
        print(f"  {who}{name} of the batch has {bad:,} values that are not finite", flush=True)
    for b, ids in zip(here, info.record_ids, strict=True):
        loss = losses[b] / max(weights[b], 1e-9)
        print(f"  {who}row {b}: loss {loss:.4g} over {weights[b]:g} target tokens; {', '.join(ids)}", flush=True)
    return host


def _row_losses(graphdef: nnx.GraphDef, params: phivision.Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Weighted loss and weight of each row, [B] each."""
    model = phivision.merge(graphdef, params)
    every = jnp.ones(batch.targets.shape, bool)  # what is not finite shows, even where nothing is learnt
    losses, _ = cross_entropy(model.hidden(batch), model.decoder.lm_head.kernel[...], batch.targets, every)
    return (losses * batch.loss_weights).sum(1), batch.loss_weights.sum(1)


def _not_finite(batch: Batch) -> dict[str, int]:
    """Fields of a host batch that hold such values, and how many."""
    found = {}
    for name in ("loss_weights", "merge_weight"):
        if (values := getattr(batch, name)) is not None and (bad := int((~np.isfinite(values)).sum())):
            found[name] = bad
    return found
