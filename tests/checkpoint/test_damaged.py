"""A training's checkpoint in which a bit has changed, wherever it is read but by its own run: loaded, started from,
exported. What is read is never taken for what was written; what is not read is in nobody's way."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import phivision_jax
from benchmarks.damage import abstract, flip
from phivision_jax.checkpoint import loading
from phivision_jax.checkpoint.layout import CHECKPOINTS, ORBAX_MARK
from phivision_jax.checkpoint.manager import RunCheckpoints
from phivision_jax.checkpoint.manifest import MANIFEST
from phivision_jax.cli.convert import main
from phivision_jax.io import storage
from phivision_jax.models.vision_tail import VisionTail
from tests.support.batches import TINY


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory) -> Path:
    """A run with one step."""
    run = tmp_path_factory.mktemp("made") / "run"
    (run / "assets").mkdir(parents=True)
    (run / "assets" / "generation_config.json").write_text(json.dumps({"temperature": 0.8}))
    tail = nnx.eval_shape(lambda: VisionTail(TINY.vision, rngs=nnx.Rngs(0)))
    tail = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), nnx.to_pure_dict(nnx.state(tail, nnx.Param)))
    params = tiny.split()[1]
    checkpoints = RunCheckpoints(run, keep=1)
    state = {"params": params, "opt_state": {"mu": params["decoder"]}, "step": jnp.int32(7)}
    checkpoints.save(state, tail, {"model": dataclasses.asdict(TINY), "run": {}}, run / "assets")
    checkpoints.close()
    return run


@pytest.fixture
def step(made, tmp_path) -> Path:
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run" / CHECKPOINTS / "7"


def files(step: Path, part: str) -> list[Path]:
    found = sorted(path for path in (step / part).rglob("*") if path.is_file() and path.stat().st_size)
    assert found
    return found


def refusal(path: Path, step: Path) -> str:
    return rf"is damaged: its file {path.relative_to(step)} does not hold the bytes"


def same(params, tiny) -> bool:
    return all(map(np.array_equal, *map(jax.tree.leaves, (params, tiny.split()[1]))))


def test_a_bit_in_any_file_of_the_weights(step, tiny, tmp_path, capsys):
    draw = random.Random(0)
    target = abstract(tiny.split()[1])
    for path in files(step, "params"):
        whole = path.read_bytes()
        flip(path, draw)
        with pytest.raises(ValueError, match=refusal(path, step)):
            loading.restore_params(step, target)
        with pytest.raises(SystemExit, match="2"):
            main(["to-hf", str(step), str(tmp_path / "hf")])
        assert f"its file {path.relative_to(step)} does not" in capsys.readouterr().err
        path.write_bytes(whole)
    assert same(loading.restore_params(step, target), tiny) and not (tmp_path / "hf").exists()


def test_what_is_beside_the_weights_is_checked_where_it_is_read(step, tmp_path):
    for part, readers in {
        "meta": [phivision_jax.load, loading.config_of],
        "assets": [phivision_jax.load, lambda path: loading.copy_assets(path, tmp_path / "copy")],
    }.items():
        for path in files(step, part):
            whole = path.read_bytes()
            flip(path, random.Random(1))
            for read in readers:
                with pytest.raises(ValueError, match=refusal(path, step)):
                    read(step)
            path.write_bytes(whole)
    assert not (tmp_path / "copy").exists()


def test_the_optimizers_state_is_in_nobodys_way(step, tiny, tmp_path):
    for path in files(step, "opt_state"):
        flip(path, random.Random(2))
    path.unlink()
    model, _ = phivision_jax.load(step.parents[1])
    assert same(model.split()[1], tiny)
    main(["to-hf", str(step), str(tmp_path / "hf")])
    model, _ = phivision_jax.load(tmp_path / "hf")
    assert same(model.split()[1], tiny)


def test_looking_and_comparing(step, tmp_path, capsys):
    """To be looked at it need not be whole; compared, it does. Without its manifest nobody can tell."""
    shutil.copytree(step, tmp_path / "whole")
    main(["verify", str(step), str(tmp_path / "whole")])
    path = max(files(step, "params"), key=lambda path: path.stat().st_size)
    flip(path, random.Random(3))
    main(["inspect", str(step)])
    with pytest.raises(SystemExit, match="2"):
        main(["verify", str(tmp_path / "whole"), str(step)])
    assert f"its file {path.relative_to(step)} does not" in capsys.readouterr().err
    (step / MANIFEST).write_bytes(b"")
    with pytest.raises(ValueError, match="its file MANIFEST is damaged"):
        loading.config_of(step)


def test_in_a_bucket_it_is_the_same(step, tiny, bucket, tmp_path, capsys):
    run = storage.location(bucket)
    storage.upload(step, run / "7")
    (run / "7" / ORBAX_MARK).write_text("by a training")
    path = files(step, "opt_state")[0].relative_to(step).as_posix()
    (run / "7" / path).write_bytes(b"another")
    target = abstract({"decoder": {"norm": tiny.split()[1]["decoder"]["norm"]}})
    read = loading.read_params(run / "7", TINY, target)
    np.testing.assert_array_equal(read["decoder"]["norm"]["scale"], tiny.split()[1]["decoder"]["norm"]["scale"])
    path = files(step, "params")[0]
    flip(path, random.Random(4))
    (run / "7" / path.relative_to(step).as_posix()).write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=refusal(path, step)):
        loading.read_params(run / "7", TINY, target)
    with pytest.raises(SystemExit, match="2"):
        main(["to-hf", bucket, str(tmp_path / "hf")])
    assert f"its file {path.relative_to(step)} does not" in capsys.readouterr().err
