"""The metadata of a checkpoint, its assets, and the version of the code."""

import json
import re
import subprocess

import pytest

import phivision_jax
from phivision_jax.checkpoint import layout
from phivision_jax.checkpoint.layout import DamagedError

META = {"model": {}, "step": 3, "run": {"lr": 1e-05, "name": "é"}, "arrays": {"params/a": ["int32", [2], "0"]}}


@pytest.fixture
def checkpoint(tmp_path):
    (tmp_path / "meta").mkdir()
    (tmp_path / "assets" / "deep").mkdir(parents=True)
    for name in ("a.txt", "deep/b"):
        (tmp_path / "assets" / name).write_text(name)
    content = layout.with_crc({**META, "assets": layout.crc_of_files(tmp_path / "assets")})
    (tmp_path / "meta" / "metadata").write_text(json.dumps(content))
    return tmp_path


def test_read_meta_gives_what_was_saved(checkpoint):
    meta = layout.read_meta(checkpoint)
    assert meta == {"format": layout.FORMAT, **META, "assets": meta["assets"]}
    assert layout.arrays_of(meta) == {"a": layout.Array("int32", (2,), "0")} and layout.arrays_of(meta, "b") == {}
    layout.check_assets(checkpoint, meta)


def test_read_meta_detects_every_flipped_bit(checkpoint):
    """A flip that changes no value, like 1e-05 to 1E-05, is none."""
    path = checkpoint / "meta" / "metadata"
    content, meta = path.read_bytes(), layout.read_meta(checkpoint)
    for bit in range(8 * len(content)):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        try:
            assert layout.read_meta(checkpoint) == meta
        except DamagedError as error:
            assert error.problem == "its file meta/metadata does not hold what was saved"


@pytest.mark.parametrize("content", [b"", b"[]", b"3", b"{}", b'{"format": 1, "model": {}}', b"\xff"])
def test_read_meta_refuses_other_content(checkpoint, content):
    (checkpoint / "meta" / "metadata").write_bytes(content)
    with pytest.raises(DamagedError, match=rf"{checkpoint} is damaged: its file meta/metadata does not hold"):
        layout.read_meta(checkpoint)


def test_read_meta_refuses_missing_file_and_later_format(checkpoint):
    path = checkpoint / "meta" / "metadata"
    path.write_text(json.dumps(layout.with_crc({"format": 9, "model": {}})))
    with pytest.raises(ValueError, match=f"has format 9; this version reads format {layout.FORMAT}"):
        layout.read_meta(checkpoint)
    path.unlink()
    with pytest.raises(DamagedError, match="its file meta/metadata is missing"):
        layout.read_meta(checkpoint)


def test_check_assets_names_the_file(checkpoint):
    meta, path = layout.read_meta(checkpoint), checkpoint / "assets" / "deep" / "b"
    (checkpoint / "assets" / "more").touch()  # not saved with the checkpoint
    layout.check_assets(checkpoint, meta)
    path.write_text("other")
    with pytest.raises(DamagedError, match="its file assets/deep/b does not hold what was saved"):
        layout.check_assets(checkpoint, meta)
    path.unlink()
    with pytest.raises(DamagedError, match="its file assets/deep/b is missing"):
        layout.check_assets(checkpoint, meta)


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


def test_code_version_outside_a_clone(installed):
    assert layout.code_version() == phivision_jax.__version__


def test_code_version_in_a_clone_names_the_commit(installed, monkeypatch):
    commit(installed)
    version = re.escape(phivision_jax.__version__)
    clean = layout.code_version()
    assert re.fullmatch(rf"{version} [0-9a-f]{{12}}", clean)
    (installed / "phivision_jax" / "checkpoint" / "layout.py").write_text("changed")
    assert layout.code_version() == f"{clean}-dirty"
    monkeypatch.setenv("PATH", "")  # no git
    assert layout.code_version() == phivision_jax.__version__


def test_code_version_ignores_a_repository_around_it(installed, monkeypatch):
    """As when the package is installed into a virtual environment in a repository."""
    commit(installed)
    inner = installed / "venv" / "phivision_jax"
    inner.mkdir(parents=True)
    monkeypatch.setattr(layout, "__file__", str(inner / "checkpoint/layout.py"))
    assert layout.code_version() == phivision_jax.__version__


@pytest.mark.parametrize("content", ["[" * 100_000, '{"step": 1e999}', '{"step": null}', "[3]", "{}", "", "\0" * 20])
def test_unreadable_record_of_the_newest_step_counts_as_none(tmp_path, content):
    (tmp_path / "saved.json").write_text(content)
    assert layout.newest_saved(tmp_path) is None
    (tmp_path / "saved.json").write_text('{"step": 3}')
    assert layout.newest_saved(tmp_path) == 3
