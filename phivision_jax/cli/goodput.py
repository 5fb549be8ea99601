"""``phivision goodput``: the wall time of runs."""

from typing import Annotated

from tyro.conf import Positional, arg


def goodput(runs: Annotated[Positional[tuple[str, ...]], arg(metavar="RUN...")], /) -> None:
    """Report how the wall time of runs was spent, restarts included: steps, compiling, saving, lost work.

    Args:
        runs: Directories of runs, as given to phivision train --run (each may be gs://…). A run may still be training.
    """
    from phivision_jax.io import storage
    from phivision_jax.training.telemetry.goodput import report

    if not runs:
        raise ValueError("name at least one directory of a run")
    print("\n\n".join(report(storage.location(run)) for run in runs))
