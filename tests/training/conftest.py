"""Data and runs that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.runs import SHORT, command, finish, write_data


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory) -> Iterator[None]:
    """Processes that tests start share their compiled programs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """500 images of 500 different sizes, each with its question: ``train`` and ``test``."""
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


@pytest.fixture(scope="session")
def short_run(data, tmp_path_factory) -> Path:
    """An undisturbed run of ``SHORT``, to compare with."""
    run = tmp_path_factory.mktemp("runs") / "short"
    finish(command(data, run, *SHORT))
    return run
