"""Read JSON of unknown origin: what is accepted, and one sentence that names the file for everything else."""

from __future__ import annotations

from pathlib import Path

import pytest

from phivision_jax.io import read_json as reader
from phivision_jax.io.messages import shorten
from phivision_jax.io.read_json import read_json


def test_accepts_objects_and_arrays_with_or_without_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(path) == {"a": 1}
    path.write_text("[1, 2]")
    assert read_json(path, list) == [1, 2]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"[1, 2]", "must contain an object, not an array"),
        (b'"text"', "must contain an object, not text"),
        (b"null", "must contain an object, not None"),
        (b"", "is not JSON"),
        (b"\x00" * 20, "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>", "HTML"),
    ],
)
def test_names_the_file_and_the_problem(tmp_path: Path, content: bytes, sentence: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=sentence) as error:
        read_json(path)
    assert str(path) in str(error.value)


def test_refuses_missing_and_huge_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"none\.json does not exist"):
        read_json(tmp_path / "none.json")
    monkeypatch.setattr(reader, "LARGEST_FILE", 10)
    (tmp_path / "big.json").write_text("[" + "1," * 10 + "1]")
    with pytest.raises(ValueError, match=r"big\.json has more than 10 bytes"):
        read_json(tmp_path / "big.json", list)


def test_shorten_limits_and_escapes_values() -> None:
    assert shorten("photo.jpg") == "photo.jpg"
    assert shorten("x" * 200_000).startswith("xxx") and len(shorten("x" * 200_000)) == 100
    assert shorten("\x1b]0;title\x07") == "\\x1b]0;title\\x07"
    assert len(shorten(list(range(10**6)))) <= 100
