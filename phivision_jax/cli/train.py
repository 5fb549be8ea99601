"""``phivision train``: train a model, or continue a run."""

from __future__ import annotations

import sys
from typing import Annotated

from tyro.conf import arg

from phivision_jax.cli import load_config
from phivision_jax.cli.main import EXPECTED

prepare = load_config.prepare


def train(
    config: Annotated[str, arg(metavar="FILE[:VARIANT]")],
    run: Annotated[str, arg(metavar="DIR")],
    replay: Annotated[int | None, arg(metavar="STEP")] = None,
    set: Annotated[tuple[str, ...], arg(metavar="FIELD=VALUE")] = (),
) -> None:
    """Train a model, or continue a run.

    A run's directory holds its plan, metrics (JSONL and TensorBoard), checkpoints and goodput account. Started again
    with the same directory, training continues from the newest checkpoint, to the same numbers that it would have
    reached undisturbed. Exit codes: 0 at the end; 75 when asked to stop, with everything saved: start it again
    (docs/launch.md has all codes).

    With a configuration, --help explains all its fields: phivision train --config=configs/finetune.py --help

    Args:
        config: Configuration file, with its variant after a colon: configs/phi4_rv_15b.py:stage2. Fields can be changed
            by flags, as in --config.optim.steps=500.
        run: Directory of the run, or gs://bucket/folder; created if new, continued if it holds checkpoints.
        replay: Repeat this step of the run and report its batch, loss and gradients; the run is not changed.
        set: Change fields of the configuration: optim.steps=500 remat=full.
    """
    from phivision_jax.distributed import processes

    processes.initialize()
    processes.exit_on_signal()
    cfg = load_config.load_config(config, set)
    with processes.propagate_failure("phivision", EXPECTED):
        from phivision_jax.training import replay as replaying
        from phivision_jax.training import run as running

        if replay is None:
            sys.exit(running.train(cfg, run))
        replaying.replay(cfg, run, replay, running.log)
