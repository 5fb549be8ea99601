"""A conversion in which a bit has changed is refused by everything that reads it, or what is read is right.

``benchmarks/damage.py --modes converted`` does more of it.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from phivision_jax.checkpoint import loading
from phivision_jax.checkpoint.layout import DamagedError, arrays_of, read_meta
from tests.support.commands import Run, refused, succeeded
from tests.support.damage import abstract, flip
from tests.support.parameter_trees import abstract_params
from tests.support.released_layout import same_directories


@pytest.fixture
def ours(hf: Path, tmp_path: Path, run: Run) -> Path:
    succeeded(run("to-jax", hf, tmp_path / "ours"))
    return tmp_path / "ours"


def load(checkpoint: Path) -> dict:
    config = loading.config_of(checkpoint)
    return loading.read_params(checkpoint, config, abstract(abstract_params(config)))


def test_conversion_describes_its_arrays(ours: Path) -> None:
    found = arrays_of(read_meta(ours))
    assert found["decoder/norm/scale"][:2] == ("float32", (16,)) and "vision_tail/post_layernorm/scale" in found
    assert read_meta(ours)["assets"].keys() == {
        "config.json", "figures/a.bin", "modeling_phi4_visionr.py", "tokenizer.json"
    }  # fmt: skip


@pytest.mark.parametrize("most", [20, pytest.param(1000, marks=pytest.mark.slow)])
def test_flipped_bit_is_refused_or_harmless(ours: Path, hf: Path, tmp_path: Path, run: Run, most: int) -> None:
    intact, rng, named = load(ours), random.Random(0), 0
    data = max((ours / "params" / "d").iterdir(), key=lambda path: path.stat().st_size)
    files = sorted(path for path in (ours / "params").rglob("*") if path.is_file() and path.stat().st_size)
    flipped = rng.sample(files, min(most, len(files)))
    for i, path in enumerate([*flipped, *[data] * 60]):  # of its bytes, a part belongs to arrays that are read
        if i >= len(flipped) and named >= 6:
            break
        content = path.read_bytes()
        flip(path, rng)
        try:
            assert all(map(np.array_equal, *map(jax.tree.leaves, (load(ours), intact))))
        except DamagedError as error:
            named += "its array params/" in str(error)
            assert str(ours) in str(error)
        code, output = run("to-hf", ours, tmp_path / "back", "--like", hf)
        if code == 0:
            assert same_directories(hf, tmp_path / "back")
            shutil.rmtree(tmp_path / "back")
        else:
            refused((code, output), f"{ours} is damaged: its array params/")
        path.write_bytes(content)
    assert named >= 6 and not (tmp_path / "back").exists()


@pytest.mark.parametrize("name", ["meta/metadata", "assets/tokenizer.json"])
def test_flipped_bit_beside_weights_is_refused(ours: Path, tmp_path: Path, run: Run, name: str) -> None:
    flip(ours / name, random.Random(0))
    refused(run("to-hf", ours, tmp_path / "back"), f"its file {name} does not hold what was saved")
    with pytest.raises(DamagedError, match=f"its file {name} does not hold"):
        loading.copy_assets(ours, tmp_path / "assets")
    assert not (tmp_path / "back").exists() and not (tmp_path / "assets").exists()
