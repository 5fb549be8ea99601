"""``phivision goodput``: where a training's time went."""

from __future__ import annotations

from typing import Annotated

from tyro.conf import Positional, arg


def goodput(runs: Annotated[Positional[tuple[str, ...]], arg(metavar="RUN...")], /) -> None:
    """Print what the wall time of trainings went to, over all their starts: steps, compiling, saving, lost work.

    Args:
        runs: Directories of runs, as train.py's --run names them, also gs://…; also of one that is still training.
    """
    from phivision_jax.io import storage
    from phivision_jax.training.telemetry.goodput_report import report

    if not runs:
        raise ValueError("name at least one directory of a run")
    print("\n\n".join(report(storage.location(run)) for run in runs))
