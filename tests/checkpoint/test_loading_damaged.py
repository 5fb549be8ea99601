"""A checkpoint of a run in which a bit has changed, read outside its run: loaded, started from, exported, compared.

``tests/convert/test_damaged.py`` does the same with conversions.
"""

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
from phivision_jax.checkpoint import loading
from phivision_jax.checkpoint.layout import CHECKPOINTS, COMMAND, CONFIG, ORBAX_MARK, DamagedError
from phivision_jax.checkpoint.manager import RunCheckpoints
from phivision_jax.cli.main import main
from phivision_jax.io import storage
from phivision_jax.models.siglip2 import VisionTail
from tests.support.batches import TINY
from tests.support.damage import abstract, flip


@pytest.fixture(scope="module")
def saved_run(tiny, tmp_path_factory) -> Path:
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
def step(saved_run, tmp_path) -> Path:
    shutil.copytree(saved_run, tmp_path / "run")
    return tmp_path / "run" / CHECKPOINTS / "7"


def files(step: Path, item: str) -> list[Path]:
    found = sorted(path for path in (step / item).rglob("*") if path.is_file() and path.stat().st_size)
    assert found
    return found


def data_file(step: Path) -> Path:
    """The file that holds most of the weights."""
    return max(files(step, "params"), key=lambda path: path.stat().st_size)


def same(params, tiny) -> bool:
    return all(map(np.array_equal, *map(jax.tree.leaves, (params, tiny.split()[1]))))


def test_flipped_bit_in_weights_is_refused_or_harmless(step, tiny, tmp_path, capsys):
    """Loading also reads files of Orbax that an export does not need."""
    rng, target, refused = random.Random(0), abstract(tiny.split()[1]), 0
    for path in [*files(step, "params"), *[data_file(step)] * 5]:
        content = path.read_bytes()
        flip(path, rng)
        try:
            assert same(loading.read_params(step, TINY, target), tiny)
        except DamagedError as error:
            refused += 1
            assert str(error).startswith(f"{step} is damaged: its ")
        try:
            main(["convert", "to-hf", str(step), str(tmp_path / "hf")])
            assert same(phivision_jax.load(tmp_path / "hf")[0].split()[1], tiny)
            shutil.rmtree(tmp_path / "hf")
        except SystemExit:
            assert f"{step} is damaged: its array params/" in capsys.readouterr().err
            assert not (tmp_path / "hf").exists()
        path.write_bytes(content)
    assert refused > 5
    assert same(loading.read_params(step, TINY, target), tiny)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_arrays_are_cast_after_they_are_verified(step, tiny, dtype):
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding), tiny.split()[1])
    restored = loading.read_params(step, TINY, target)
    assert all(
        np.array_equal(found, np.asarray(x).astype(dtype)) and found.dtype == dtype
        for found, x in zip(*map(jax.tree.leaves, (restored, tiny.split()[1])), strict=True)
    )


def test_files_beside_weights_are_verified_by_their_readers(step, tmp_path):
    for name, readers in {
        "meta/metadata": [phivision_jax.load, loading.config_of],
        "assets/generation_config.json": [
            phivision_jax.load,
            lambda path: loading.copy_assets(path, tmp_path / "copy"),
        ],
    }.items():
        content = (step / name).read_bytes()
        flip(step / name, random.Random(1))
        for read in readers:
            with pytest.raises(DamagedError, match=rf"its file {name} does not hold"):
                read(step)
        (step / name).write_bytes(content)
    assert not (tmp_path / "copy").exists()


def test_loading_a_run_with_its_configuration_warns_of_nothing(step, tiny, caplog):
    """A config.json of Hugging Face is distinguished from the run's."""
    for name in (CONFIG, COMMAND):
        (step.parents[1] / name).write_text("{}")
    with caplog.at_level("WARNING"):
        model, _ = phivision_jax.load(step.parents[1])
    assert same(model.split()[1], tiny) and caplog.messages == []


def test_damaged_optimizer_state_is_ignored(step, tiny, tmp_path):
    for path in files(step, "opt_state"):
        flip(path, random.Random(2))
    path.unlink()
    model, _ = phivision_jax.load(step.parents[1])
    assert same(model.split()[1], tiny)
    main(["convert", "to-hf", str(step), str(tmp_path / "hf")])
    model, _ = phivision_jax.load(tmp_path / "hf")
    assert same(model.split()[1], tiny)


def test_inspect_reads_no_weights_and_verify_does(step, tmp_path, capsys):
    shutil.copytree(step, tmp_path / "intact")
    main(["convert", "verify", str(step), str(tmp_path / "intact")])
    data = data_file(step)
    data.write_bytes(bytes(data.stat().st_size))
    with pytest.raises(SystemExit, match="2"):
        main(["convert", "verify", str(tmp_path / "intact"), str(step)])
    assert f"{step} is damaged: its array params/" in capsys.readouterr().err
    (step / "meta" / "metadata").write_bytes(b"")
    with pytest.raises(SystemExit, match="2"):
        main(["convert", "inspect", str(step)])
    assert "its file meta/metadata does not hold" in capsys.readouterr().err


def test_checkpoint_in_bucket_is_verified(step, tiny, bucket, tmp_path, capsys):
    run = storage.location(bucket)
    storage.upload(step, run / "7")
    (run / "7" / ORBAX_MARK).write_text("by a training run")
    path = files(step, "opt_state")[0].relative_to(step).as_posix()
    (run / "7" / path).write_bytes(b"another")
    target = abstract({"decoder": {"norm": tiny.split()[1]["decoder"]["norm"]}})
    read = loading.read_params(run / "7", TINY, target)
    np.testing.assert_array_equal(read["decoder"]["norm"]["scale"], tiny.split()[1]["decoder"]["norm"]["scale"])
    path = data_file(step)
    (run / "7" / path.relative_to(step).as_posix()).write_bytes(bytes(path.stat().st_size))
    with pytest.raises(DamagedError, match=rf"{run}/7 is damaged: its array params/.* cannot be read"):
        loading.read_params(run / "7", TINY, abstract(tiny.split()[1]))
    with pytest.raises(SystemExit, match="2"):
        main(["convert", "to-hf", bucket, str(tmp_path / "hf")])
    assert f"{run}/7 is damaged: its array params/" in capsys.readouterr().err
