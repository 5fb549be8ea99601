"""``phivision train``: train a model, or continue a run."""

import sys
from typing import Annotated

from tyro.conf import arg

from phivision_jax.cli import load_config
from phivision_jax.cli.main import EXPECTED

prepare = load_config.prepare


def train(
    run: Annotated[str, arg(metavar="DIR")],
    config: Annotated[str, arg(metavar="FILE[:VARIANT]")] = "",
    replay: Annotated[int | None, arg(metavar="STEP")] = None,
    set: Annotated[tuple[str, ...], arg(metavar="FIELD=VALUE")] = (),
) -> None:
    """Train a model, or continue a run.

    A run's directory holds its configuration, plan, metrics (JSONL and TensorBoard), checkpoints and the account of its
    wall time. The same command with the same directory continues from the newest checkpoint and reaches the same
    numbers as without the interruption. The exit code is 0 when training is complete, and 75 when the process was asked
    to stop and has saved everything, so that it can be restarted (docs/launch.md lists all exit codes).

    To see all fields of a configuration, add --help to it: phivision train --config=configs/finetune.py --help

    Args:
        run: Directory of the run, or gs://bucket/folder; created if new, continued if it holds checkpoints.
        config: Configuration file, with a variant after a colon: configs/phi4_rv_15b.py:stage2. Flags change its
            fields, as in --config.optim.steps=500. Only --replay needs none: it takes the run's config.json.
        replay: Step of the run to repeat: report its batch, loss and gradients, and do not change the run.
        set: Change fields of the configuration, as in optim.steps=500 remat=full.
    """
    from phivision_jax.distributed import processes

    processes.initialize()
    processes.exit_on_signal()
    if not config and replay is None:
        raise ValueError("give --config=FILE; configs/finetune.py trains a checkpoint on your own data")
    cfg = load_config.load_config(config or f"{run}/config.json", set)
    with processes.propagate_failure("phivision", EXPECTED):
        from phivision_jax.training import replay as replaying
        from phivision_jax.training import run as running

        if replay is None:
            sys.exit(running.train(cfg, run))
        replaying.replay(cfg, run, replay, running.log)
