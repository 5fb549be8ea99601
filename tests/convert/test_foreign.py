"""Directories that are not what they seem: one sentence names the kind and the remedy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from phivision_jax.checkpoint import loading
from phivision_jax.text.template import ChatTemplate
from phivision_jax.text.tokenizer import Tokenizer
from tests.support.commands import Run, refused, succeeded
from tests.support.released_layout import SMALL, random_tensors, read_tensors, same_directories, shapes_of, write_hf

INDEX, SHARD = "model.safetensors.index.json", "model-00002-of-00003.safetensors"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "a" * 64 + "\nsize 4977222960\n"
PAGE = "<!DOCTYPE html><html>Access denied</html>" * 5


def only(hf: Path, *names: str) -> None:
    shutil.rmtree(hf)
    hf.mkdir()
    for name in names:
        (hf / name).parent.mkdir(parents=True, exist_ok=True)
        (hf / name).write_text(json.dumps(SMALL))


def renamed(hf: Path, rename: Callable[[str], str]) -> None:
    tensors = {rename(name): array for name, array in read_tensors(hf).items()}
    for file in hf.glob("model*"):
        file.unlink()
    save_file(tensors, hf / "model.safetensors")


KINDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "adapter": (lambda hf: only(hf, "adapter_config.json", "adapter_model.safetensors"), "holds a PEFT adapter"),
    "adapter and config": (lambda hf: only(hf, "config.json", "adapter_config.json"), "holds a PEFT adapter"),
    "gguf": (lambda hf: only(hf, "model-Q4_K_M.gguf"), "holds GGUF weights only (model-Q4_K_M.gguf)"),
    "pickle": (lambda hf: only(hf, "config.json", "pytorch_model.bin"), "pickled weights only (pytorch_model.bin)"),
    "no index": (lambda hf: (hf / INDEX).unlink(), f"without their index: copy {INDEX}"),
    "hub cache": (
        lambda hf: only(hf, "refs/main", "snapshots/abc/config.json", "snapshots/abc/model.safetensors"),
        "hf is the root of a hub cache: give its snapshot, ",
    ),
    "two models": (
        lambda hf: save_file(read_tensors(hf), hf / "model.safetensors"),
        f"holds {INDEX} and a model.safetensors that it does not name: remove the old one",
    ),
    "compiled": (lambda hf: renamed(hf, "_orig_mod.{}".format), "holds tensors as torch.compile names them"),
    "parallel": (lambda hf: renamed(hf, "module.{}".format), "holds tensors as DataParallel names them"),
    "wrapped": (
        lambda hf: renamed(hf, lambda name: name.replace("model.layers", "model.language_model.layers")),
        "without 'language_model.' in the names",
    ),
    "unmerged": (
        lambda hf: renamed(hf, lambda name: name.replace("o_proj.weight", "o_proj.base_layer.weight")),
        "holds tensors as PEFT names them",
    ),
    "pointer as shard": (lambda hf: (hf / SHARD).write_text(POINTER), f"{SHARD} is a pointer of Git LFS"),
    "page as shard": (lambda hf: (hf / SHARD).write_text(PAGE), f"{SHARD} is an HTML page"),
    "pointer as config": (lambda hf: (hf / "config.json").write_text(POINTER), "config.json is a pointer of Git LFS"),
    "page as index": (lambda hf: (hf / INDEX).write_text(PAGE), f"{INDEX} is an HTML page"),
    "list as config": (lambda hf: (hf / "config.json").write_text("[]"), "config.json must contain an object"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kind_is_named(hf: Path, tmp_path: Path, run: Run, kind: str) -> None:
    change, sentence = KINDS[kind]
    change(hf)
    for command in (("to-jax", hf, tmp_path / "ours"), ("inspect", hf)):
        refused(run(*command), str(hf), sentence)
    with pytest.raises(ValueError, match="hf") as error:
        path = loading.locate(hf)
        loading.read_params(path, loading.config_of(path), {})
    assert sentence in str(error.value)


def test_directory_of_no_kind_may_hold_links(tmp_path: Path) -> None:
    """They are not blamed: no file of such a directory is read."""
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / ".venv").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="project is no checkpoint"):
        loading.locate(tmp_path / "project")


def test_known_buffers_are_ignored(tmp_path: Path, run: Run) -> None:
    tensors = random_tensors(shapes_of(SMALL), np.float32)
    plain = write_hf(tmp_path / "plain", SMALL, tensors)
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32) for i in range(3)}
    buffers["model.vision_tower.vision_tower.vision_model.embeddings.position_ids"] = np.arange(4)[None]
    hf = write_hf(tmp_path / "hf", SMALL, tensors | buffers)
    assert "ignoring 4 buffers" in succeeded(run("to-jax", hf, tmp_path / "ours"))
    assert "89 tensors with identical bytes" in succeeded(run("verify", plain, tmp_path / "ours"))
    refused(run("to-hf", tmp_path / "ours", tmp_path / "back", "--like", hf), "holds buffers", "convert without --like")


def test_assets_of_run_and_conversion_are_the_same(hf: Path, tmp_path: Path, run: Run) -> None:
    """Weights in other formats at the top are left behind, files of the same kinds below it are kept."""
    for name in ("pytorch_model.bin", "model-Q4.gguf", "flax_model.msgpack", "old.safetensors"):
        (hf / name).write_bytes(b"weights")
    succeeded(run("to-jax", hf, tmp_path / "ours"))
    loading.copy_assets(hf, tmp_path / "assets")
    assert same_directories(tmp_path / "assets", tmp_path / "ours" / "assets")
    assert sorted(path.name for path in (tmp_path / "assets").rglob("*") if path.is_file()) == [
        "a.bin", "config.json", "modeling_phi4_visionr.py", "tokenizer.json"
    ]  # fmt: skip


@pytest.mark.parametrize(("content", "sentence"), [(POINTER, "is a pointer of Git LFS"), (PAGE, "is an HTML page")])
def test_tokenizer_of_another_kind_is_named(tmp_path: Path, content: str, sentence: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=f"tokenizer.json {sentence}"):
        Tokenizer.from_directory(tmp_path)


def test_tokenizer_config_as_list_is_named(tmp_path: Path) -> None:
    Tokenizer.small().save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json must contain an object, not an array"):
        Tokenizer.from_directory(tmp_path)


def test_byte_order_marks_are_skipped(tmp_path: Path) -> None:
    Tokenizer.small().save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    for file in tmp_path.iterdir():
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert Tokenizer.from_directory(tmp_path).encode("a red") == Tokenizer.small().encode("a red")
    assert ChatTemplate.from_directory(tmp_path).render([{"role": "user", "content": "x"}])[0] == "x"


def test_template_in_json_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "old", "eos_token": "END"}))
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "new {{ eos_token }}"}))
    assert ChatTemplate.from_directory(tmp_path).render([])[0] == "new END"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": [{"name": "default", "template": "x"}]}))
    assert ChatTemplate.from_directory(tmp_path).render([])[0] == "x"


def test_wrong_direction_is_named(hf: Path, tmp_path: Path, run: Run) -> None:
    succeeded(run("to-jax", hf, tmp_path / "ours"))
    refused(run("to-hf", hf, tmp_path / "x"), f"{hf} is a Hugging Face directory ({INDEX}): phivision convert to-jax")
    refused(run("to-jax", tmp_path / "ours", tmp_path / "x"), f"{tmp_path / 'ours'} is no Hugging Face directory")
