"""Directories in a bucket are read by ranges, and written completely or not at all. An emulator serves the bucket."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import phivision_jax
from phivision_jax.checkpoint import loading
from phivision_jax.convert import ours, output
from phivision_jax.convert.hf_config import model_config
from phivision_jax.io import storage
from phivision_jax.io.storage import location
from phivision_jax.models import phivision
from phivision_jax.processor import Processor
from phivision_jax.text.tokenizer import Tokenizer
from tests.support.batches import EXAMPLES, random_rows
from tests.support.checkpoints import save_checkpoint
from tests.support.commands import Run, refused, succeeded
from tests.support.parameter_trees import abstract_params, flatten, tree_from_hf
from tests.support.paths import ROOT
from tests.support.released_layout import (
    SMALL,
    random_tensors,
    read_tensors,
    same_directories,
    shapes_of,
    write_hf,
    write_small,
)
from tests.support.train_steps import QUICK

TEXT = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory for what is uploaded; tests check that it is empty again."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setenv(storage.SCRATCH, str(folder))
    return folder


@pytest.fixture
def hf(hf: Path, bucket: str) -> Path:
    """A small Hugging Face directory on this machine and at BUCKET/hf."""
    storage.upload(hf, location(f"{bucket}/hf"))
    return hf


def listed(place: str) -> dict[str, int]:
    return storage.files(location(place))


def test_bucket_there_and_back_is_byte_exact(bucket: str, hf: Path, tmp_path: Path, scratch: Path, run: Run) -> None:
    text = succeeded(run("to-jax", f"{bucket}/hf", f"{bucket}/ours"))
    assert f"89 tensors, {12840:,} parameters" in text and f"wrote {bucket}/ours" in text
    succeeded(run("to-hf", f"{bucket}/ours", f"{bucket}/back", "--like", f"{bucket}/hf"))
    storage.download(location(f"{bucket}/back"), tmp_path / "back")
    assert same_directories(hf, tmp_path / "back")
    for other in (hf, f"{bucket}/hf"):
        assert "8 byte-identical, 0 different, 0 on one" in succeeded(run("verify", f"{bucket}/back", other))
    assert "same" in succeeded(run("verify", f"{bucket}/ours", hf))
    found = json.loads(run("inspect", f"{bucket}/ours", "--json")[1])
    assert {name: tuple(value["shape"]) for name, value in found["tensors"].items()} == shapes_of(SMALL)
    # A conversion on this machine that is copied there by other means is the same.
    succeeded(run("to-jax", hf, tmp_path / "ours"))
    storage.upload(tmp_path / "ours", location(f"{bucket}/copied"))
    succeeded(run("verify", f"{bucket}/copied", f"{bucket}/ours"))
    assert listed(f"{bucket}/copied").keys() >= {"params/commit_success.txt", "meta/metadata"}
    assert sorted({name.split("/")[0] for name in listed(bucket)}) == ["back", "copied", "hf", "ours"]
    assert list(scratch.iterdir()) == []


def test_bucket_reads_ranges_and_copies_no_shard(
    bucket: str, hf: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ours, "BLOCK_BYTES", 700)
    read, fetched = [], []
    read_range, download = storage.read_range, storage.download
    monkeypatch.setattr(storage, "read_range", lambda *a: read.append(a) or read_range(*a))
    monkeypatch.setattr(storage, "download", lambda s, t, names: fetched.extend(names) or download(s, t, names))
    succeeded(run("to-jax", f"{bucket}/hf", tmp_path / "ours"))
    succeeded(run("verify", tmp_path / "ours", hf))
    data = [count for path, start, count in read if storage.is_remote(path) and start > 8]
    assert max(data) <= 700 and sum(data) == sum(tensor.nbytes for tensor in read_tensors(hf).values())
    assert sorted(fetched) == ["a.bin", "config.json", "modeling_phi4_visionr.py", "tokenizer.json"]


@pytest.fixture
def model_hf(tmp_path: Path, bucket: str) -> Path:
    """A Hugging Face directory with a tokenizer, on this machine and at BUCKET/hf."""
    tokens = Tokenizer.small()
    ids = {"vocab_size": tokens.vocab_size, "eos_token_id": tokens.eos_id, "pad_token_id": tokens.pad_id}
    values = {**SMALL, **ids}
    directory = write_hf(tmp_path / "hf", values, random_tensors(shapes_of(values), np.float32))
    Processor.small(model_config(directory)).save(directory)
    (directory / "figures" / "a.bin").rename(directory / "figures" / "a.png")
    storage.upload(directory, location(f"{bucket}/hf"))
    return directory


def test_load_from_bucket_is_same_model(bucket: str, model_hf: Path, tmp_path: Path, run: Run) -> None:
    succeeded(run("to-jax", f"{bucket}/hf", f"{bucket}/ours"))
    want, processor = phivision_jax.load(model_hf)
    assert processor.tokenizer.encode("what is this?")
    batch = random_rows(np.random.default_rng(3), want.config, [EXAMPLES[:3]])
    forward = jax.jit(lambda params: phivision.merge(want.split()[0], params)(batch), compiler_options=QUICK)
    for kind in ("hf", "ours"):
        model, its = phivision_jax.load(f"{bucket}/{kind}")
        np.testing.assert_array_equal(forward(model.split()[1]), forward(want.split()[1]))
        assert its.fingerprint == processor.fingerprint
        # The other files that a run takes from it.
        assets = tmp_path / f"assets-{kind}"
        loading.copy_assets(loading.locate(f"{bucket}/{kind}"), assets)
        assert storage.files(assets).keys() == {*TEXT, "config.json", "modeling_phi4_visionr.py", "figures/a.png"}
        assert all((assets / name).read_bytes() == (model_hf / name).read_bytes() for name in storage.files(assets))


def test_read_params_shards_from_bucket(bucket: str, hf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "BLOCK_BYTES", 300)  # several blocks to a share
    config, tensors = model_config(hf), read_tensors(hf)
    want = dict(flatten(tree_from_hf(tensors.__getitem__, config)))
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def sharded(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        free, axes = dict(mesh.shape), []
        for size in leaf.shape:
            axes.append(next((axis for axis, parts in free.items() if size % parts == 0), None))
            free.pop(axes[-1], None)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    target = jax.tree.map(sharded, abstract_params(config, vision_tail=False))
    for place in (location(f"{bucket}/hf"), hf):
        for path, leaf in flatten(loading.read_params(place, config, target)):
            np.testing.assert_array_equal(leaf, want[path], err_msg=path)


def test_verify_reads_checkpoint_without_ocdbt(bucket: str, hf: Path, tmp_path: Path, run: Run) -> None:
    config, folder = model_config(hf), tmp_path / "step"
    params = tree_from_hf(read_tensors(hf).__getitem__, config, vision_tail=True)
    params = jax.tree.map(jax.numpy.asarray, params)
    save_checkpoint(folder, params, config, use_ocdbt=False)
    storage.upload(folder, location(f"{bucket}/step"))
    assert "89 tensors with identical bytes" in succeeded(run("verify", f"{bucket}/step", hf))


# ---------------------------------------------------------------------------------------------------------------------
# Uploads.

STAGES = {"first files": 0, "commit marks": 1, "checkpoint mark": 2}
"""Calls of ``storage.upload`` in one conversion."""


def stop_at(stage: str, error: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Call ``error`` at this stage, when half of its files are uploaded."""
    upload, left = storage.upload, [STAGES[stage]]

    def stopping(source: Path, target: Any, names: list[str], description: str = "") -> None:
        if not left[0]:
            upload(source, target, names[: len(names) // 2])
            error()
        left[0] -= 1
        upload(source, target, names, description)

    monkeypatch.setattr(storage, "upload", stopping)


@pytest.mark.parametrize(
    ("command", "stage"),
    [
        pytest.param("to-jax", "first files", marks=pytest.mark.slow),
        ("to-jax", "checkpoint mark"),
        pytest.param("to-hf", "first files", marks=pytest.mark.slow),
        ("to-hf", "checkpoint mark"),
    ],
)
def test_kill_in_upload_leaves_nothing_complete(
    bucket: str,
    hf: Path,
    tmp_path: Path,
    scratch: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    stage: str,
) -> None:
    """The state after SIGKILL: nothing is cleaned up. The next conversion there reports and replaces it."""
    succeeded(run("to-jax", hf, tmp_path / "ours"))
    out = f"{bucket}/out"
    convert_it = ("to-jax", hf, out) if command == "to-jax" else ("to-hf", tmp_path / "ours", out, "--like", hf)
    with monkeypatch.context() as patch:
        stop_at(stage, lambda: 1 / 0, patch)
        patch.setattr(output, "_withdraw", lambda *args: None)
        with pytest.raises(ZeroDivisionError):
            run(*convert_it)
    left = len(listed(out))
    assert left > STAGES[stage] and (location(bucket) / "out.uploading").exists()
    assert run("inspect", out)[0] == 2 and run("verify", hf, out)[0] == 2
    with pytest.raises(ValueError, match=out):
        phivision_jax.load(out)
    assert f"removing {left} files at {out}, left by an interrupted upload" in succeeded(run(*convert_it))
    succeeded(run("verify", hf, out))
    assert sorted(child.name for child in location(bucket).iterdir()) == ["hf", "out"]
    assert list(scratch.iterdir()) == []


def test_sigkill_in_upload_is_cleaned_up(bucket: str, hf: Path, tmp_path: Path, scratch: Path, run: Run) -> None:
    """The next conversion, to any place, also removes the directory on this machine."""
    program = f"""if True:
        import os, signal, sys
        from phivision_jax.cli.main import main
        from phivision_jax.io import storage
        upload = storage.upload
        storage.upload = lambda s, t, names, d="": (upload(s, t, names[:2]), os.kill(os.getpid(), signal.SIGKILL))
        main(["convert", "to-hf", {str(tmp_path / "ours")!r}, {bucket + "/out"!r}])"""
    succeeded(run("to-jax", hf, tmp_path / "ours"))
    died = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    (left,) = scratch.iterdir()
    assert left.name.startswith(".convert.partial-") and len(listed(f"{bucket}/out")) == 2
    assert run("inspect", f"{bucket}/out")[0] == 2
    assert f"removing {left}" in succeeded(run("to-jax", hf, f"{bucket}/elsewhere"))
    assert "removing 2 files at" in succeeded(run("to-jax", hf, f"{bucket}/out"))
    succeeded(run("verify", hf, f"{bucket}/out"))


@pytest.mark.parametrize("stage", ["commit marks", pytest.param("checkpoint mark", marks=pytest.mark.slow)])
def test_failed_upload_is_withdrawn(
    bucket: str, hf: Path, scratch: Path, run: Run, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    def fail() -> None:
        raise storage.StorageError("gs://…: the bucket does not answer")

    stop_at(stage, fail, monkeypatch)
    refused(run("to-jax", hf, f"{bucket}/out"), "the bucket does not answer")
    assert listed(bucket).keys() == {f"hf/{name}" for name in storage.files(hf)}
    assert list(scratch.iterdir()) == []


def test_bucket_overwrite_replaces_only_checkpoints(
    bucket: str, hf: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = location(f"{bucket}/out")
    (out / "notes" / "mine.txt").write_text("mine")
    (location(f"{bucket}/out2") / "theirs.txt").write_text("theirs")
    (location(bucket) / "out.txt").write_text("other")
    for more, why in (((), "exists already"), (("--overwrite",), "is not a checkpoint")):
        refused(run("to-jax", hf, out, *more), str(out), why)
        refused(run("to-jax", hf, f"{bucket}/out.txt", *more), "out.txt", why)
    assert listed(bucket)["out/notes/mine.txt"] == 4
    storage.remove(out)
    before = write_small(tmp_path / "before", shards=1)
    storage.upload(before, out)
    refused(run("to-jax", hf, out), "exists already")
    refused(run("to-jax", out, out, "--overwrite"), "holds the source")
    edited = write_small(tmp_path / "edited")
    os.truncate(edited / SHARD, 1000)
    refused(run("to-jax", edited, out, "--overwrite"), SHARD)
    storage.download(out, tmp_path / "still")
    assert same_directories(before, tmp_path / "still")
    succeeded(run("to-jax", hf, out, "--overwrite"))
    assert "model.safetensors" not in listed(str(out)) and "same" in succeeded(run("verify", out, hf))
    # Its mark is removed first: after a kill then, neither the old nor the new checkpoint is there.
    with monkeypatch.context() as patch:
        patch.setattr(storage, "remove", lambda path: 1 / 0)
        patch.setattr(output, "_withdraw", lambda *args: None)
        with pytest.raises(ZeroDivisionError):
            run("to-jax", hf, out, "--overwrite")
    assert run("inspect", out)[0] == 2
    assert "left by an interrupted upload" in succeeded(run("to-jax", hf, out))
    assert listed(bucket)["out2/theirs.txt"] == 6 and listed(bucket)["out.txt"] == 5


def test_bucket_concurrent_conversions(bucket: str, hf: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    out = f"{bucket}/out"
    unfinished = output.new_checkpoint(location(out), False, [], print)
    with pytest.raises(FileExistsError, match="appeared meanwhile"), unfinished as place:
        place.rmdir()
        write_small(place)
        succeeded(run("to-jax", hf, out))
    succeeded(run("verify", hf, out))  # the first one stays
    stop_at("commit marks", lambda: (location(out) / "stray").write_text("by another"), monkeypatch)
    storage.remove(location(out))
    refused(run("to-jax", hf, out), "does not hold what was uploaded")
    assert listed(out) == {}


def test_bucket_needs_scratch_space(bucket: str, hf: Path, scratch: Path, run: Run, monkeypatch: Any) -> None:
    free = {scratch: 1000}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free.get(path, 10**12)))
    refused(run("to-jax", hf, f"{bucket}/out"), f"{bucket}/out: needs 51.9 kB", str(scratch), storage.SCRATCH)
    assert listed(f"{bucket}/out") == {}


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes.


def test_bucket_names_truncated_shard(bucket: str, hf: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = location(f"{bucket}/hf/{SHARD}")
    content, read_range = shard.read_bytes(), storage.read_range
    shard.write_bytes(content[:-1])
    refused(run("to-jax", f"{bucket}/hf", f"{bucket}/out"), f"{shard}: {len(content) - 1} bytes")
    location(f"{bucket}/hf/tokenizer.json").unlink()  # not a real one, and load reads it first
    with pytest.raises(ValueError, match=str(shard)):
        phivision_jax.load(f"{bucket}/hf")
    shard.write_bytes(content)
    with monkeypatch.context() as patch:  # while it is read
        patch.setattr(storage, "read_range", lambda *a: read_range(*a)[: -1 if a[1] > 8 and a[0] == shard else None])
        refused(run("verify", f"{bucket}/hf", hf), f"{shard} ended while it was read")
    assert listed(f"{bucket}/out") == {}


def test_bucket_names_truncated_checkpoint(bucket: str, hf: Path, run: Run) -> None:
    succeeded(run("to-jax", hf, f"{bucket}/ours"))
    data = [name for name in listed(f"{bucket}/ours") if name.startswith("params/d/")]
    for name in data:
        path = location(f"{bucket}/ours/{name}")
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])  # the last bytes may be a node that a later one has replaced
    code, text = run("to-hf", f"{bucket}/ours", f"{bucket}/out")
    assert code == 2 and "params" in text and "Traceback" not in text, text
    assert listed(f"{bucket}/out") == {}


def test_bucket_names_wrong_url(bucket: str, hf: Path, run: Run) -> None:
    nowhere, no_bucket = f"{bucket}/nowhere", "gs://no-such-bucket/x"
    for place, why in ((nowhere, "not a directory"), (no_bucket, "there is no bucket"), ("s3://b/x", "gs://bucket")):
        for command in (("to-jax", place, f"{bucket}/out"), ("inspect", place), ("verify", hf, place)):
            refused(run(*command), place, why)
        refused(run("to-hf", place, f"{bucket}/out"), place)
        with pytest.raises((ValueError, OSError), match=f"{place}.*{why}"):
            phivision_jax.load(place)
    refused(run("to-jax", hf, "gs://no-such-bucket/x"), "gs://no-such-bucket/x", "there is no bucket")
    refused(run("to-jax", hf, "gs://bucket"), "gs://bucket is the top of a bucket")
    assert listed(bucket).keys() == {f"hf/{name}" for name in storage.files(hf)}
