"""A conversion that fails prints one line, exits with 2, and leaves no directory that looks complete."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from phivision_jax.checkpoint import layout
from phivision_jax.checkpoint.checksums import StreamedChecksums
from phivision_jax.checkpoint.layout import COMMAND, CONFIG
from phivision_jax.convert.hf_config import model_config
from phivision_jax.convert.mapping import model_leaves
from phivision_jax.convert.ours import OursSink
from phivision_jax.convert.output import new_checkpoint
from phivision_jax.io import atomic
from tests.support.checkpoints import edit_meta
from tests.support.commands import Run, refused, succeeded
from tests.support.paths import ROOT
from tests.support.released_layout import SMALL, read_tensors, same_directories, shapes_of, write_hf, write_small

SHARD = "model-00002-of-00003.safetensors"
INDEX = "model.safetensors.index.json"
O_PROJ = "model.layers.1.self_attn.o_proj.weight"


def edit(hf: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    """Replace the three shards by one with changed tensors."""
    tensors = read_tensors(hf)
    change(tensors)
    for path in (*hf.glob("*.safetensors"), hf / INDEX):
        path.unlink()
    save_file(tensors, hf / "model.safetensors")


def edit_index(hf: Path, name: str, file: str | None) -> None:
    index = json.loads((hf / INDEX).read_text())
    if file is None:
        del index["weight_map"][name]
    else:
        index["weight_map"][name] = file
    (hf / INDEX).write_text(json.dumps(index))


def edit_header(hf: Path, old: bytes, new: bytes) -> None:
    data = (hf / SHARD).read_bytes()
    assert old in data and len(old) == len(new)
    (hf / SHARD).write_bytes(data.replace(old, new, 1))


def overlap(hf: Path) -> None:
    """Give two tensors of the same size the same place: the file has the stated length, and lacks one tensor."""
    data = (hf / SHARD).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    ones = [name for name in header if header[name].get("shape") == [12]]
    header[ones[0]]["data_offsets"] = header[ones[1]]["data_offsets"]
    raw = json.dumps(header).encode()
    (hf / SHARD).write_bytes(len(raw).to_bytes(8, "little") + raw + data[8 + length :])


def pickled_only(hf: Path) -> None:
    for path in (*hf.glob("*.safetensors"), hf / INDEX):
        path.unlink()
    (hf / "pytorch_model.bin").write_bytes(b"\x80\x02")


def mixed_dtypes(tensors: dict[str, np.ndarray]) -> None:
    tensors[O_PROJ] = tensors[O_PROJ].astype(ml_dtypes.bfloat16)


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda hf: edit(hf, lambda t: t.pop(O_PROJ)), f"1 missing: {O_PROJ}"),
    "extra": (lambda hf: edit(hf, lambda t: t.update(odd=np.zeros(2, np.float32))), "1 extra: odd"),
    "mis-shaped": (
        lambda hf: edit(hf, lambda t: t.update({O_PROJ: np.zeros((16, 15), np.float32)})),
        f"1 mis-shaped: {O_PROJ} [16, 15] (expected [16, 16])",
    ),
    "truncated": (lambda hf: os.truncate(hf / SHARD, (hf / SHARD).stat().st_size - 1), f"{SHARD}: "),
    "truncated in the header": (lambda hf: os.truncate(hf / SHARD, 100), f"{SHARD}: not safetensors, or truncated"),
    "empty": (lambda hf: os.truncate(hf / SHARD, 0), f"{SHARD}: not safetensors, or truncated"),
    "too long": (lambda hf: (hf / SHARD).open("ab").write(b"x"), f"{SHARD}: "),
    "shard missing": (lambda hf: (hf / SHARD).unlink(), f"names {SHARD}, which is not a file"),
    "index elsewhere": (lambda hf: edit_index(hf, O_PROJ, "../a.safetensors"), "names ../a.safetensors"),
    "index names what the shard lacks": (
        lambda hf: edit_index(hf, "ghost.weight", SHARD),
        f"{SHARD} against {INDEX}: 1 missing: ghost.weight",
    ),
    "index omits": (lambda hf: edit_index(hf, O_PROJ, None), f"1 extra: {O_PROJ}"),
    "index corrupt": (lambda hf: (hf / INDEX).write_text("{"), f"{INDEX} is not JSON"),
    "index empty": (lambda hf: (hf / INDEX).write_text("{}"), f"{INDEX}: weight_map must be a group of fields"),
    "index without tensors": (lambda hf: (hf / INDEX).write_text('{"weight_map": {}}'), "its weight_map is empty"),
    "header corrupt": (lambda hf: edit_header(hf, b'"dtype"', b'"dtybe"'), "the safetensors header is corrupt"),
    "header not JSON": (lambda hf: edit_header(hf, b'{"__meta', b"((__meta"), "the safetensors header is corrupt"),
    "shape of no numbers": (lambda hf: edit_header(hf, b"[16,", b'["",'), "the safetensors header is corrupt"),
    "tensors overlap": (overlap, "the header is corrupt"),
    "header length": (lambda hf: (hf / SHARD).open("r+b").write(b"\xff" * 8), "header length of 18446744073709551615"),
    "float64": (lambda hf: edit(hf, lambda t: t.update({O_PROJ: np.zeros((16, 16))})), f"{O_PROJ} is F64"),
    "integers": (lambda hf: edit(hf, lambda t: t.update({O_PROJ: np.zeros((16, 16), np.int32)})), f"{O_PROJ} is I32"),
    "dtypes mixed over layers": (lambda hf: edit(hf, mixed_dtypes), "pass --dtype"),
    "no config": (lambda hf: (hf / "config.json").unlink(), "config.json"),
    "another model": (lambda hf: (hf / "config.json").write_text('{"model_type": "llama"}'), "model_type 'llama'"),
    "pickle": (pickled_only, "pickled weights only (pytorch_model.bin)"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_to_jax_names_bad_source(hf: Path, tmp_path: Path, run: Run, fault: str) -> None:
    damage, fragment = FAULTS[fault]
    damage(hf)
    refused(run("to-jax", hf, tmp_path / "ours"), fragment)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_to_hf_names_bad_checkpoint(hf: Path, tmp_path: Path, run: Run) -> None:
    checkpoint = tmp_path / "ours"
    refused(run("to-hf", tmp_path / "nowhere", tmp_path / "x"), "nowhere does not exist")
    succeeded(run("to-jax", hf, checkpoint))
    arrays = layout.read_meta(checkpoint)["arrays"]
    del arrays["params/decoder/norm/scale"]
    edit_meta(checkpoint, arrays=arrays)
    refused(run("to-hf", checkpoint, tmp_path / "x"), "1 missing: decoder/norm/scale")
    shutil.rmtree(checkpoint / "params" / "d")
    edit_meta(checkpoint, arrays=arrays | {"params/decoder/norm/scale": ["float32", [16], "00000000"]})
    refused(run("to-hf", checkpoint, tmp_path / "x"), f"{checkpoint} is damaged: its array params/")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "ours"]


def test_to_hf_refuses_truncated_data(hf: Path, tmp_path: Path, run: Run) -> None:
    checkpoint = tmp_path / "ours"
    succeeded(run("to-jax", hf, checkpoint))
    for path in (checkpoint / "params" / "d").iterdir():
        os.truncate(path, path.stat().st_size // 2)
    refused(run("to-hf", checkpoint, tmp_path / "x"), "cannot be read")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "ours"]


def test_flipped_bits_are_refused_or_harmless(hf: Path, tmp_path: Path, run: Run) -> None:
    """After a flipped bit anywhere in a conversion, the export is exact, or the command fails and leaves nothing."""
    succeeded(run("to-jax", hf, tmp_path / "ours"))
    files = sorted(path for path in (tmp_path / "ours").rglob("*") if path.is_file() and path.stat().st_size)
    rng, refusals = np.random.default_rng(0), 0
    for path in rng.choice(np.array(files), 12):
        content = bytearray(path.read_bytes())
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        original = path.read_bytes()
        path.write_bytes(content)
        result = run("to-hf", tmp_path / "ours", tmp_path / "back")
        if result[0]:
            refused(result, str(tmp_path / "ours"))
            assert not (tmp_path / "back").exists()
            refusals += 1
        else:
            tensors = read_tensors(tmp_path / "back")
            assert all(np.array_equal(tensor, tensors[name]) for name, tensor in read_tensors(hf).items())
            shutil.rmtree(tmp_path / "back")
        path.write_bytes(original)
    assert refusals


def test_to_jax_destinations(hf: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "ours"
    (tmp_path / "file").write_text("")
    refused(run("to-jax", hf, tmp_path / "file" / "ours"), "file")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("")
    refused(run("to-jax", hf, tmp_path / "precious"), "exists already")
    refused(run("to-jax", hf, tmp_path / "precious", "--overwrite"), "is not a checkpoint")
    refused(run("to-jax", hf, hf, "--overwrite"), "holds the source")
    succeeded(run("to-jax", hf, out))
    before = (out / "meta" / "metadata").read_bytes()
    (hf / SHARD).rename(hf / "gone")
    assert run("to-jax", hf, out, "--overwrite")[0] == 2
    assert (out / "meta" / "metadata").read_bytes() == before  # replaced after success only
    (hf / "gone").rename(hf / SHARD)
    succeeded(run("to-jax", hf, out, "--overwrite", "--dtype", "bfloat16"))
    assert run("verify", hf, out)[0] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "hf", "ours", "precious"]


# ---------------------------------------------------------------------------------------------------------------------
# Killed, interrupted, out of disk. The sources are sparse files that take about a second to convert and no space; the
# temporary directory appears when writing begins.

BIG = SMALL | {"vocab_size": 100_000, "hidden_size": 2048, "num_attention_heads": 4, "num_key_value_heads": 2}


def sparse_hf(directory: Path) -> Path:
    """A Hugging Face directory of zeros in one sparse file."""
    directory.mkdir()
    header, end = {}, 0
    for name, shape in shapes_of(BIG).items():
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end := end + 4 * math.prod(shape)]}
    raw = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as f:
        f.write(len(raw).to_bytes(8, "little") + raw)
        f.truncate(8 + len(raw) + end)
    (directory / "config.json").write_text(json.dumps(BIG))
    return directory


def sparse_ours(directory: Path) -> Path:
    """The same as a checkpoint of ours: arrays without chunks read as zeros."""
    directory.mkdir()
    config = model_config(BIG)
    leaves = model_leaves(config)
    meta = {"model": dataclasses.asdict(config), "step": 0}
    OursSink(dict.fromkeys(leaves, np.dtype(np.float32)), meta, directory).finish()
    edit_meta(directory, arrays={f"params/{leaf.path}": zeros(leaf.shape) for leaf in leaves})
    return directory


@functools.cache
def zeros(shape: tuple[int, ...]) -> layout.Array:
    """The metadata of a float32 array of zeros."""
    step = max(1, 1_000_000 // math.prod(shape[1:]))
    sums = StreamedChecksums()
    for start in range(0, shape[0], step):
        block = np.zeros((min(step, shape[0] - start), *shape[1:]), np.float32)
        if complete := sums.add("zeros", block, (slice(start, None),), shape):
            return complete
    raise AssertionError("an array without elements")


START = """if True:
    import resource, runpy, signal, sys
    # A shell ignores SIGINT for background jobs, and their children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    limit = int(sys.argv.pop(1))
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    runpy.run_module("convert", run_name="__main__", alter_sys=True)
"""


def start(*argv: object, limit: int = 0) -> subprocess.Popen[str]:
    """``python -m convert …`` in a new process, which may write files of up to ``limit`` bytes."""
    command = [sys.executable, "-c", START, str(limit), *map(str, argv)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def wait_for_partial(folder: Path, process: subprocess.Popen[str]) -> Path:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if found := list(folder.glob(".out.partial-*")):
            return found[0]
        time.sleep(0.001)
    raise AssertionError(f"no temporary directory appeared: {process.communicate()[1]}")


@pytest.mark.parametrize("command", ["to-jax", "to-hf"])
def test_kill_leaves_nothing_complete(tmp_path: Path, run: Run, command: str) -> None:
    source = (sparse_hf if command == "to-jax" else sparse_ours)(tmp_path / "source")
    work = tmp_path / "work"
    with start(command, source, work / "out") as process:
        partial = wait_for_partial(work, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert list(work.iterdir()) == [partial]  # under the temporary name only, and neither kind of checkpoint:
    assert run("inspect", partial)[0] == 2
    # The next conversion reports and removes it.
    small = write_small(tmp_path / "small")
    assert f"removing {partial}" in run("to-jax", small, work / "out")[1]
    assert [path.name for path in work.iterdir()] == ["out"]
    assert run("verify", small, work / "out")[0] == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    source, work = sparse_hf(tmp_path / "source"), tmp_path / "work"
    with start("to-jax", source, work / "out") as process:
        wait_for_partial(work, process)
        process.send_signal(number)
        assert process.wait() == 130
        assert process.stderr is not None
        text = process.stderr.read()
    assert "interrupted" in text and "Traceback" not in text
    assert list(work.iterdir()) == []


def test_new_checkpoint_keeps_what_came_first(tmp_path: Path) -> None:
    """The second conversion leaves the directory of the first alone, and the later one does not replace the earlier."""
    out, other = tmp_path / "out", tmp_path / "other"
    with pytest.raises(FileExistsError, match="appeared meanwhile"), new_checkpoint(out, False, [], print) as first:
        with new_checkpoint(other, False, [], print) as second:
            (second / "second").touch()
        with pytest.raises(BlockingIOError):
            atomic.lock(first)
        other.rename(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "second").exists()


@pytest.mark.parametrize("command", ["to-jax", "to-hf"])
def test_full_disk_leaves_nothing(tmp_path: Path, command: str) -> None:
    """A limit on the size of files takes the place of a full disk."""
    source, work = (sparse_hf if command == "to-jax" else sparse_ours)(tmp_path / "source"), tmp_path / "work"
    with start(command, source, work / "out", limit=50_000_000) as process:
        assert process.wait() == 2
        assert process.stderr is not None
        text = process.stderr.read()
    refused((2, text))
    assert list(work.iterdir()) == []


def test_to_jax_checks_free_space_first(hf: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    refused(run("to-jax", hf, tmp_path / "ours"), "needs")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_overwrite_keeps_old_checkpoint_when_stopped(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the two renames of --overwrite the old checkpoint has a name that no later conversion removes."""
    hf, out = write_small(tmp_path / "hf"), tmp_path / "work" / "ours"
    assert run("to-jax", hf, out)[0] == 0
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, to: 1 / 0 if to == out else rename(self, to))
    with pytest.raises(ZeroDivisionError):
        run("to-jax", hf, out, "--overwrite")
    monkeypatch.undo()
    (old,) = out.parent.iterdir()
    assert old.name.startswith("ours.old-") and run("verify", hf, old)[0] == 0
    assert run("to-jax", hf, out)[0] == 0
    assert same_directories(old / "assets", out / "assets") and old.exists()


def test_overwrite_does_not_replace_a_training_run(tmp_path: Path, run: Run) -> None:
    hf, out = write_small(tmp_path / "hf"), tmp_path / "run"
    out.mkdir()
    for name in (CONFIG, COMMAND):
        (out / name).write_text("{}")
    refused(run("to-jax", hf, out, "--overwrite"), "exists and is not a checkpoint")
    refused(run("inspect", out), "is no checkpoint")


@pytest.mark.parametrize("size", ["0", "-1", "inf", "nan"])
def test_shard_size_is_a_number(tmp_path: Path, run: Run, size: str) -> None:
    refused(run("to-hf", tmp_path, tmp_path / "out", "--max-shard-size", size), "is a positive number of GB, not")


def test_report_of_a_conversion_escapes_its_directories(tmp_path: Path, run: Run) -> None:
    report = succeeded(run("to-jax", write_small(tmp_path / "hf"), tmp_path / "a\x1b[31m"))
    assert "\x1b[31m" not in report and "wrote" in report and "a\\x1b[31m" in report


def test_to_jax_omits_weights_beside_index(tmp_path: Path, run: Run) -> None:
    """A stray shard is not an asset; --like copies it like every other file."""
    hf = write_hf(tmp_path / "hf", SMALL, read_tensors(write_small(tmp_path / "a")))
    save_file({"x": np.zeros(3)}, hf / "consolidated.safetensors")
    assert run("to-jax", hf, tmp_path / "ours")[0] == 0
    assert not list((tmp_path / "ours").rglob("*.safetensors"))
    assert run("to-hf", tmp_path / "ours", tmp_path / "back", "--like", hf)[0] == 0
    assert same_directories(hf, tmp_path / "back")


PEAK = """
import os, subprocess, sys
_, status, usage = os.wait4(subprocess.Popen(sys.argv[1:]).pid, 0)
print(usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))
sys.exit(os.waitstatus_to_exitcode(status))
"""
"""Runs a command and prints its peak of memory. A process starts with the peak of its parent, here a small one."""


@pytest.mark.slow
@pytest.mark.parametrize("command", ["to-jax", "to-hf"])
def test_memory_is_bounded(tmp_path: Path, command: str) -> None:
    """2 GB with two tables of 0.8 GB each are converted in less than the memory of one."""
    source = (sparse_hf if command == "to-jax" else sparse_ours)(tmp_path / "source")
    words = [sys.executable, "-c", PEAK, sys.executable, "-m", "convert", command, str(source), str(tmp_path / "out")]
    result = subprocess.run(words, stdout=subprocess.PIPE, text=True, cwd=ROOT, check=True)
    assert 50_000_000 < int(result.stdout.split()[-1]) < 800_000_000
