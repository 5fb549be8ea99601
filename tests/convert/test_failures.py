"""What goes wrong is said in a line or two, with exit code 2, and leaves no directory that looks complete."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from phivision_jax.convert.hf_config import model_config
from phivision_jax.convert.mapping import model_leaves
from phivision_jax.convert.ours import OursSink
from phivision_jax.convert.output import abandoned, staged
from tests.support.released_layout import SMALL, read_tensors, same_directories, shapes_of, write_hf, write_small

Run = Callable[..., tuple[int, str]]
SHARD = "model-00002-of-00003.safetensors"
INDEX = "model.safetensors.index.json"
O_PROJ = "model.layers.1.self_attn.o_proj.weight"


def edit(hf: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    """Replace the three shards by one with its tensors changed."""
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
    """Two tensors of one size at one place: the file is as long as it says, and one tensor is not in it."""
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
    "truncated in the header": (lambda hf: os.truncate(hf / SHARD, 100), f"{SHARD}: not safetensors, or cut short"),
    "empty": (lambda hf: os.truncate(hf / SHARD, 0), f"{SHARD}: not safetensors, or cut short"),
    "too long": (lambda hf: (hf / SHARD).open("ab").write(b"x"), f"{SHARD}: "),
    "shard missing": (lambda hf: (hf / SHARD).unlink(), f"names {SHARD}, which is not a file"),
    "index elsewhere": (lambda hf: edit_index(hf, O_PROJ, "../a.safetensors"), "names ../a.safetensors"),
    "index names what the shard lacks": (
        lambda hf: edit_index(hf, "ghost.weight", SHARD),
        f"{SHARD} against {INDEX}: 1 missing: ghost.weight",
    ),
    "index omits": (lambda hf: edit_index(hf, O_PROJ, None), f"1 extra: {O_PROJ}"),
    "index corrupt": (lambda hf: (hf / INDEX).write_text("{"), f"{INDEX} is not JSON"),
    "index empty": (lambda hf: (hf / INDEX).write_text("{}"), f"{INDEX} has no weight_map"),
    "header corrupt": (lambda hf: edit_header(hf, b'"dtype"', b'"dtybe"'), "the safetensors header is corrupt"),
    "header not JSON": (lambda hf: edit_header(hf, b'{"__meta', b"((__meta"), "the safetensors header is corrupt"),
    "tensors overlap": (overlap, "the header is corrupt"),
    "header length": (lambda hf: (hf / SHARD).open("r+b").write(b"\xff" * 8), "header length of 18446744073709551615"),
    "float64": (lambda hf: edit(hf, lambda t: t.update({O_PROJ: np.zeros((16, 16))})), f"{O_PROJ} is F64"),
    "integers": (lambda hf: edit(hf, lambda t: t.update({O_PROJ: np.zeros((16, 16), np.int32)})), f"{O_PROJ} is I32"),
    "dtypes mixed over layers": (lambda hf: edit(hf, mixed_dtypes), "pass --dtype"),
    "no config": (lambda hf: (hf / "config.json").unlink(), "config.json"),
    "another model": (lambda hf: (hf / "config.json").write_text('{"model_type": "llama"}'), "model_type 'llama'"),
    "pickle": (pickled_only, "pickled weights only (pytorch_model.bin)"),
}


def said_shortly(result: tuple[int, str], fragment: str) -> None:
    code, text = result
    error = text[text.index("error: ") :]
    assert code == 2
    assert fragment in error
    assert error.count("\n") <= 2 and len(error) < 600 and "Traceback" not in text


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_source_is_named_and_leaves_nothing(tmp_path: Path, run: Run, fault: str) -> None:
    hf = write_small(tmp_path / "hf")
    break_it, fragment = FAULTS[fault]
    break_it(hf)
    said_shortly(run("to-jax", hf, tmp_path / "ours"), fragment)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_bad_checkpoint_of_ours_is_named_and_leaves_nothing(tmp_path: Path, run: Run) -> None:
    hf, checkpoint = write_small(tmp_path / "hf"), tmp_path / "ours"
    said_shortly(run("to-hf", tmp_path / "nowhere", tmp_path / "x"), "nowhere does not exist")
    assert run("to-jax", hf, checkpoint)[0] == 0
    metadata = checkpoint / "params" / "_METADATA"
    whole = json.loads(metadata.read_text())
    del whole["tree_metadata"]["('decoder', 'norm', 'scale')"]
    metadata.write_text(json.dumps(whole))
    said_shortly(run("to-hf", checkpoint, tmp_path / "x"), "1 missing: decoder/norm/scale")
    metadata.unlink()
    said_shortly(run("to-hf", checkpoint, tmp_path / "x"), "no _METADATA")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "ours"]


def test_a_damaged_data_file_of_ours_is_an_error(tmp_path: Path, run: Run) -> None:
    hf, checkpoint = write_small(tmp_path / "hf"), tmp_path / "ours"
    assert run("to-jax", hf, checkpoint)[0] == 0
    for path in (checkpoint / "params" / "d").iterdir():
        os.truncate(path, path.stat().st_size // 2)
    said_shortly(run("to-hf", checkpoint, tmp_path / "x"), "cannot read")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "ours"]


def test_destinations(tmp_path: Path, run: Run) -> None:
    hf, out = write_small(tmp_path / "hf"), tmp_path / "ours"
    (tmp_path / "file").write_text("")
    said_shortly(run("to-jax", hf, tmp_path / "file" / "ours"), "file")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("")
    said_shortly(run("to-jax", hf, tmp_path / "precious"), "exists already")
    said_shortly(run("to-jax", hf, tmp_path / "precious", "--overwrite"), "is not a checkpoint")
    said_shortly(run("to-jax", hf, hf, "--overwrite"), "holds the source")
    assert run("to-jax", hf, out)[0] == 0
    before = (out / "meta" / "metadata").read_bytes()
    (hf / SHARD).rename(hf / "gone")
    assert run("to-jax", hf, out, "--overwrite")[0] == 2
    assert (out / "meta" / "metadata").read_bytes() == before  # replaced after success only
    (hf / "gone").rename(hf / SHARD)
    assert run("to-jax", hf, out, "--overwrite", "--dtype", "bfloat16")[0] == 0
    assert run("verify", hf, out)[0] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "hf", "ours", "precious"]


# ---------------------------------------------------------------------------------------------------------------------
# Ends that a process cannot report: killed, interrupted, out of disk. On a gigabyte of holes, which takes seconds to
# convert and no space until it is; the tmp directory appears when writing begins.

BIG = SMALL | {"vocab_size": 100_000, "hidden_size": 2048, "num_attention_heads": 4, "num_key_value_heads": 2}


def holes(directory: Path) -> Path:
    """A whole checkpoint of zeros in one sparse file."""
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


def holes_of_ours(directory: Path) -> Path:
    """The same as a checkpoint of ours: arrays without a chunk read as zeros."""
    directory.mkdir()
    config = model_config(BIG)
    leaves = model_leaves(config)
    sink = OursSink(directory, {leaf.path: np.dtype(np.float32) for leaf in leaves}, leaves)
    sink.finish(config, {"step": 0})
    return directory


def start(*argv: object, limit: int | None = None) -> subprocess.Popen[str]:
    def prepare() -> None:
        # A shell ignores SIGINT for what it runs in the background, and its children inherit that.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, "-m", "convert", *map(str, argv)]
    root = Path(__file__).parents[2]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=root, preexec_fn=prepare)


def wait_for_tmp(folder: Path, process: subprocess.Popen[str]) -> Path:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if found := list(folder.glob("out.tmp-*")):
            return found[0]
        time.sleep(0.001)
    raise AssertionError(f"no tmp directory appeared: {process.communicate()[1]}")


@pytest.mark.parametrize("command", ["to-jax", "to-hf"])
def test_killed_half_way(tmp_path: Path, run: Run, command: str) -> None:
    source = (holes if command == "to-jax" else holes_of_ours)(tmp_path / "source")
    work = tmp_path / "work"
    with start(command, source, work / "out") as process:
        tmp = wait_for_tmp(work, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert list(work.iterdir()) == [tmp]  # under the tmp name only, and that is neither kind of checkpoint:
    assert run("inspect", tmp)[0] == 2
    # The next run, of a smaller source, says so and clears it away.
    small = write_small(tmp_path / "small")
    assert f"removing {tmp}" in run("to-jax", small, work / "out")[1]
    assert [path.name for path in work.iterdir()] == ["out"]
    assert run("verify", small, work / "out")[0] == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_half_way(tmp_path: Path, number: signal.Signals) -> None:
    source, work = holes(tmp_path / "source"), tmp_path / "work"
    with start("to-jax", source, work / "out") as process:
        wait_for_tmp(work, process)
        process.send_signal(number)
        assert process.wait() == 130
        assert process.stderr is not None
        said = process.stderr.read()
    assert "interrupted" in said and "Traceback" not in said
    assert list(work.iterdir()) == []


def test_two_conversions_to_one_place(tmp_path: Path) -> None:
    """The second leaves the first one's directory alone, and who comes last does not replace who came first."""
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="appeared meanwhile"), staged(out) as first:
        with staged(tmp_path / "out2") as other:
            (other / "second").touch()
        assert not abandoned(first)
        (tmp_path / "out2").rename(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "second").exists()


@pytest.mark.parametrize("command", ["to-jax", "to-hf"])
def test_disk_full(tmp_path: Path, command: str) -> None:
    """A limit on the size of a file is the disk full that a test can have."""
    source, work = (holes if command == "to-jax" else holes_of_ours)(tmp_path / "source"), tmp_path / "work"
    with start(command, source, work / "out", limit=50_000_000) as process:
        assert process.wait() == 2
        assert process.stderr is not None
        said = process.stderr.read()
    assert "error: " in said and said[said.index("error: ") :].count("\n") == 1
    assert list(work.iterdir()) == []


def test_no_space_is_refused_before_anything_is_written(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf = write_small(tmp_path / "hf")
    monkeypatch.setattr("phivision_jax.convert.output.free_bytes", lambda path: 1000)
    said_shortly(run("to-jax", hf, tmp_path / "ours"), "needs")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_stopped_rename_keeps_the_old_checkpoint(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the two renames of --overwrite the old checkpoint is under a name that no later run clears away."""
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


def test_extra_weights_beside_the_index_are_not_taken(tmp_path: Path, run: Run) -> None:
    """A stray shard is nobody's: to-jax leaves it out of the assets, --like copies it like every other file."""
    hf = write_hf(tmp_path / "hf", SMALL, read_tensors(write_small(tmp_path / "a")))
    save_file({"x": np.zeros(3)}, hf / "consolidated.safetensors")
    assert run("to-jax", hf, tmp_path / "ours")[0] == 0
    assert not list((tmp_path / "ours").rglob("*.safetensors"))
    assert run("to-hf", tmp_path / "ours", tmp_path / "back", "--like", hf)[0] == 0
    assert same_directories(hf, tmp_path / "back")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["to-jax", "to-hf"])
def test_memory_does_not_grow_with_the_model(tmp_path: Path, command: str) -> None:
    """2 GB, two tables of 0.8 GB among them, in less than one of these (0.2 GB of it is Python and its libraries)."""
    source = (holes if command == "to-jax" else holes_of_ours)(tmp_path / "source")
    process = start(command, source, tmp_path / "out")
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = status
    assert status == 0
    assert usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) < 800_000_000
