"""The one version of tokamax whose kernels ``splash`` and ``flash`` call: private modules without a stable API."""

from __future__ import annotations

from importlib import metadata

TOKAMAX = "0.0.17"


def require_tokamax() -> None:
    """Raise ImportError unless tokamax is installed in the version that ``splash`` and ``flash`` are written for."""
    try:
        found = metadata.version("tokamax")
    except metadata.PackageNotFoundError:
        found = "none"
    if found != TOKAMAX:
        raise ImportError(
            f"attention kernels need tokamax {TOKAMAX}, but the installed version is {found}; run "
            f"`pip install tokamax=={TOKAMAX}`, or disable kernels: models.attention.attend.backend('xla')"
        )
