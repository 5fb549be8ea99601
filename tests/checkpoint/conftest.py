"""Run directories with checkpoints of the small state."""

import shutil

import pytest

from phivision_jax.checkpoint.layout import CHECKPOINTS
from tests.support.damage import NEW, OLD, make_run


@pytest.fixture(scope="session")
def made_run(tmp_path_factory):
    """A run directory with the steps OLD and NEW; copy it before changing it."""
    run = tmp_path_factory.mktemp("made") / "run"
    make_run(run, (OLD, NEW))
    return run


@pytest.fixture
def run(made_run, tmp_path):
    shutil.copytree(made_run, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def newest(run):
    """The directory of the newest step of ``run``."""
    return run / CHECKPOINTS / str(NEW)


@pytest.fixture
def empty_run(tmp_path):
    """A run directory with assets and no checkpoint yet."""
    make_run(tmp_path / "empty", ())
    return tmp_path / "empty"
