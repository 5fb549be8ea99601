"""``phivision goodput``: the wall time of runs."""

from __future__ import annotations

from typing import Annotated

from tyro.conf import Positional, arg


def goodput(runs: Annotated[Positional[tuple[str, ...]], arg(metavar="RUN...")], /) -> None:
    """Report the wall time of runs over all their starts: steps, compiling, saving, lost work.

    Args:
        runs: Directories of runs (each may be gs://…), as given to phivision train --run; a run may still be training.
    """
    from phivision_jax.io import storage
    from phivision_jax.training.telemetry.goodput_report import report

    if not runs:
        raise ValueError("name at least one directory of a run")
    print("\n\n".join(report(storage.location(run)) for run in runs))
