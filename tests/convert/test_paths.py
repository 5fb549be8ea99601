"""Model directories of unknown origin whose links leave them, and paths with "..", for every reader."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from phivision_jax.checkpoint import layout, loading
from phivision_jax.config import ModelConfig
from phivision_jax.convert.hf import INDEX, HFDirectory
from phivision_jax.convert.hf_config import model_config
from phivision_jax.io import storage
from phivision_jax.processor import Processor
from tests.support.commands import Run
from tests.support.released_layout import same_directories

LINKS = ["notes.txt", "config.json", "tokenizer.json", "chat_template.jinja", "model-00001-of-00003.safetensors", "sub"]
READERS: dict[str, Callable[[Path, Path], object]] = {
    "config": lambda path, out: model_config(path),
    "tokenizer and template": lambda path, out: Processor.from_directory(path, None),
    "weights": lambda path, out: HFDirectory(path),
    "assets": lambda path, out: loading.copy_assets(path, out),
    "load": lambda path, out: loading.load(path),
}


def link_out(directory: Path, name: str) -> None:
    """Put a link to a private file, or folder, in the place of a file."""
    private = directory.parent / "private"
    private.mkdir(exist_ok=True)
    (private / "key").write_text("secret")
    (directory / name).unlink(missing_ok=True)
    (directory / name).symlink_to(private if name == "sub" else private / "key")


@pytest.mark.parametrize("name", LINKS)
def test_link_out_of_a_model_directory_is_refused_by_every_reader(hf: Path, tmp_path: Path, run: Run, name: str):
    link_out(hf, name)
    out = tmp_path / "out"
    for read in READERS.values():
        with pytest.raises(ValueError, match=r"is a link to /.*/private(/key)?, outside of its directory"):
            read(hf, out)
    for words in (["to-jax", hf, out], ["inspect", hf], ["verify", hf, hf]):
        code, output = run(*words)[:2]
        assert code == 2, (words, output)
    assert not out.exists()


@pytest.mark.parametrize("name", ["assets/notes.txt", "assets/sub", "params/manifest.ocdbt", "meta/metadata"])
def test_link_out_of_a_checkpoint_is_refused_by_every_reader(hf: Path, tmp_path: Path, run: Run, name: str):
    ours, out = tmp_path / "ours", tmp_path / "out"
    assert run("to-jax", hf, ours)[0] == 0
    link_out(ours, name)
    for read in (layout.read_meta, loading.load, lambda path: loading.copy_assets(path, out)):
        with pytest.raises(ValueError, match=r"is a link to /.*/private(/key)?, outside of its directory"):
            read(ours)
    for words in (["to-hf", ours, out], ["inspect", ours], ["verify", ours, hf], ["to-hf", ours, out, "--like", hf]):
        assert run(*words)[0] == 2, words
    assert not out.exists()


def test_snapshot_of_a_cache_is_read(hf: Path, tmp_path: Path, run: Run):
    """Its files are links to the cache's blobs."""
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0f", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(hf.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", str(number)))
    assert run("to-jax", snapshot, tmp_path / "ours")[0] == 0
    assert run("to-hf", tmp_path / "ours", tmp_path / "back", "--like", snapshot)[0] == 0
    assert storage.files(tmp_path / "back").keys() == storage.files(snapshot).keys()


def test_paths_may_climb(hf: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (hf / "tokenizer.json").unlink()  # of no use
    assert run("to-jax", "../hf", "../ours")[0] == 0
    assert run("inspect", "../ours")[0] == run("inspect", "../hf")[0] == 0
    assert run("to-hf", "../ours", "../here/../back", "--like", "../hf")[0] == 0
    assert same_directories(hf, tmp_path / "back")
    assert run("verify", "../back", "./../ours")[0] == 0
    loading.load("../ours")
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("file", ["../private/weights", "/etc/hostname", "sub/../../private/weights", ".."])
def test_index_that_names_files_elsewhere_is_refused(hf: Path, tmp_path: Path, file: str):
    index = json.loads((hf / INDEX).read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], file)
    (hf / INDEX).write_text(json.dumps(index))
    (hf / "tokenizer.json").unlink()  # of no use
    (tmp_path / "private").mkdir()
    (hf / "model-00001-of-00003.safetensors").rename(tmp_path / "private" / "weights")
    for read in (HFDirectory, loading.load):
        with pytest.raises(ValueError, match="which is not a file in"):
            read(hf)


@pytest.mark.parametrize("name", ["../../../private/key", "/etc/hostname", "..", "a/../../meta/metadata"])
def test_metadata_that_name_assets_elsewhere_are_refused(hf: Path, tmp_path: Path, run: Run, name: str):
    """With the right CRC of the metadata, and of the file."""
    assert run("to-jax", hf, tmp_path / "ours")[0] == 0
    path = tmp_path / "ours" / layout.METADATA
    meta = {key: value for key, value in json.loads(path.read_text()).items() if key != "crc32"}
    path.write_text(json.dumps(layout.with_crc({**meta, "assets": {name: "00000000"}})))
    with pytest.raises(ValueError, match="which is no path below a directory"):
        layout.read_meta(tmp_path / "ours", assets=True)


def test_link_in_the_assets_of_a_run_is_not_copied_into_a_checkpoint(tmp_path: Path):
    (tmp_path / "assets").mkdir()
    link_out(tmp_path / "assets", "notes.txt")
    for read in (layout.crc_of_files, lambda path: Processor.from_directory(path, ModelConfig())):
        with pytest.raises(ValueError, match="outside of its directory"):
            read(tmp_path / "assets")
