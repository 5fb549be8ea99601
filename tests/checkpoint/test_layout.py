"""Where a checkpoint's parts are is tested with those who read them; here, what it says of the code."""

import re
import subprocess

import pytest

import phivision_jax
from phivision_jax.checkpoint import layout


def git(directory, *words):
    name = ("-c", "user.name=a", "-c", "user.email=a@example.com")
    subprocess.run(["git", "-C", str(directory), *name, *words], check=True, capture_output=True)


def commit(directory):
    git(directory, "init")
    git(directory, "add", ".")
    git(directory, "commit", "-m", "one")


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The package in a directory of its own."""
    package = tmp_path / "phivision_jax" / "checkpoint"
    package.mkdir(parents=True)
    (package / "layout.py").write_text("")
    monkeypatch.setattr(layout, "__file__", str(package / "layout.py"))
    return tmp_path


def test_outside_a_clone_the_code_is_its_version(installed):
    assert layout.code_version() == phivision_jax.__version__


def test_in_a_clone_it_is_the_commit_too(installed, monkeypatch):
    commit(installed)
    version = re.escape(phivision_jax.__version__)
    clean = layout.code_version()
    assert re.fullmatch(rf"{version} [0-9a-f]{{12}}", clean)
    (installed / "phivision_jax" / "checkpoint" / "layout.py").write_text("changed")
    assert layout.code_version() == f"{clean}-dirty"
    monkeypatch.setenv("PATH", "")  # no git
    assert layout.code_version() == phivision_jax.__version__


def test_a_repository_around_it_is_not_its_clone(installed, monkeypatch):
    """Installed into a virtual environment that lies in one, for instance."""
    commit(installed)
    inner = installed / "venv" / "phivision_jax"
    inner.mkdir(parents=True)
    monkeypatch.setattr(layout, "__file__", str(inner / "checkpoint/layout.py"))
    assert layout.code_version() == phivision_jax.__version__
