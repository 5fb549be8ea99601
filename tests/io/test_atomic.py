"""Atomic writes: readers never see a part, and what a killed process left is removed."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from phivision_jax.io import atomic
from phivision_jax.io.atomic import with_filename
from tests.support.paths import ROOT


def names(directory):
    return sorted(os.listdir(directory))


def run_python(script, *words):
    return subprocess.run([sys.executable, "-c", script, *map(str, words)], cwd=ROOT, capture_output=True, text=True)


def test_write_replaces_content(tmp_path):
    for content in ("one", b"\x00two"):
        atomic.write(tmp_path / "a", content)
        assert (tmp_path / "a").read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert names(tmp_path) == ["a"]


def test_write_in_bucket(bucket):
    from phivision_jax.io import storage

    path = storage.location(bucket) / "a" / "b"
    atomic.write(path, "text")
    assert path.read_text() == "text"


def test_new_file_keeps_old_content_on_error(tmp_path):
    atomic.write(tmp_path / "a", "old")
    with pytest.raises(ZeroDivisionError), atomic.new_file(tmp_path / "a") as file:
        file.write(b"new")
        raise ZeroDivisionError
    assert (tmp_path / "a").read_text() == "old" and names(tmp_path) == ["a"]


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_kill_leaves_destination_untouched(tmp_path, kind):
    script = "import os, signal, sys; from pathlib import Path; from phivision_jax.io import atomic\n"
    script += f"with atomic.new_{kind}(Path(sys.argv[1])) as new:\n"
    script += "    new.write(b'x') if hasattr(new, 'write') else (new / 'x').write_text('x')\n"
    script += "    os.kill(os.getpid(), signal.SIGKILL)"
    assert run_python(script, tmp_path / "out").returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists() and len(names(tmp_path)) == 1
    log = []
    if kind == "file":
        atomic.write(tmp_path / "out", "later")
    else:
        with atomic.new_directory(tmp_path / "out", log=log.append) as new:
            (new / "y").touch()
        assert names(tmp_path / "out") == ["y"] and "left by an interrupted process" in log[0]
    assert names(tmp_path) == ["out"]


def test_new_directory_is_removed_on_error(tmp_path):
    with pytest.raises(ZeroDivisionError), atomic.new_directory(tmp_path / "out") as new:
        (new / "a").touch()
        raise ZeroDivisionError
    assert names(tmp_path) == []


def test_new_directory_replaces_only_when_allowed(tmp_path):
    for replace in (False, True):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "old").touch()
        try:
            with atomic.new_directory(tmp_path / "out", replace=replace) as new:
                (new / "new").touch()
        except FileExistsError:
            assert not replace and names(tmp_path / "out") == ["old"]
    assert names(tmp_path / "out") == ["new"] and names(tmp_path) == ["out"]


def test_new_directory_leaves_one_in_use_alone(tmp_path):
    log = []
    with pytest.raises(FileExistsError), atomic.new_directory(tmp_path / "out") as first:
        (first / "a").touch()
        with atomic.new_directory(tmp_path / "out", log=log.append) as second:
            (second / "b").touch()
        assert first.is_dir() and not log
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["b"]


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_lock_is_exclusive_and_dies_with_its_holder(tmp_path, kind):
    path = tmp_path / "lock"
    if kind == "directory":
        path.mkdir()
    held = atomic.lock(path)
    with pytest.raises(BlockingIOError):
        atomic.lock(path)
    os.close(held)
    script = "import os, signal, sys; from pathlib import Path; from phivision_jax.io import atomic\n"
    script += "atomic.lock(Path(sys.argv[1])); os.kill(os.getpid(), signal.SIGKILL)"
    assert run_python(script, path).returncode == -signal.SIGKILL
    os.close(atomic.lock(path))


def test_with_filename_names_unnamed_errors_only(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"), with_filename(tmp_path / "other"):
        (tmp_path / "nowhere").read_text()
    with (
        pytest.raises(PermissionError, match=r"^\[Errno 13\] no: '.*/other'$") as raised,
        with_filename(tmp_path / "other"),
    ):
        raise OSError(errno.EACCES, "no")
    assert isinstance(raised.value.__cause__, PermissionError)
    with pytest.raises(OSError, match=r"^only words$"), with_filename(tmp_path / "other"):
        raise OSError("only words")
