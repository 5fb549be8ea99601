"""Loading in int8, against the same checkpoint whose rows were rounded by hand; and the memory that loading takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from PIL import Image

import phivision_jax
from phivision_jax.convert import ours
from phivision_jax.rows import batch_from_ids
from tests.support.forward import logits
from tests.support.parameter_trees import flatten
from tests.support.paths import ROOT
from tests.support.released_layout import SMALL, random_tensors, shapes_of, write_hf

ON_DEVICES = {"fsdp": 2, "tensor": 4}
"""Four devices along tensor, but two KV heads."""


def rounded(tensor: np.ndarray) -> np.ndarray:
    """Rows of a matrix as multiples of their scale."""
    scale = [[np.abs(row).max() / np.float32(127)] for row in tensor]
    scale = np.array(scale, np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)
    return np.clip(np.round(tensor / scale), -127, 127).astype(np.float32) * scale


def directory(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    write_hf(path, SMALL, tensors)
    (path / "tokenizer.json").unlink()
    return path


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    return random_tensors(shapes_of(SMALL), np.float32)


@pytest.fixture(scope="module")
def hf(tensors, tmp_path_factory) -> Path:
    return directory(tmp_path_factory.mktemp("loading") / "hf", tensors)


def test_int8_computes_with_rounded_rows(hf, tensors, tmp_path, monkeypatch):
    monkeypatch.setattr(ours, "BLOCK_BYTES", 300)  # several blocks to a matrix
    kept = ("position_embedding.weight", "head.probe")
    by_hand = {
        name: rounded(tensor) if tensor.ndim == 2 and not name.endswith(kept) else tensor
        for name, tensor in tensors.items()
    }
    want, _ = phivision_jax.load(directory(tmp_path / "rounded", by_hand), mesh={"data": 1})
    got, _ = phivision_jax.load(hf, weights="int8", mesh={"data": 1})
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8))
    batch = batch_from_ids([[1, 2, -200, 3, 4]], [[image]], config=want.config)
    expected = logits(*want.split(), batch)
    np.testing.assert_allclose(logits(*got.split(), batch), expected, atol=1e-5 * float(jnp.abs(expected).max()))
    params = dict(flatten(got.split()[1]))
    assert params["decoder/layers/mlp/up_proj/kernel"].dtype == jnp.int8
    assert params["decoder/norm/scale"].dtype == jnp.float32
    scale = tensors["lm_head.weight"][5:6]
    np.testing.assert_array_equal(
        params["decoder/lm_head/kernel"][5], np.round(rounded(scale) * 127 / np.abs(rounded(scale)).max())[0]
    )


def test_int8_is_the_same_on_any_mesh_and_in_any_dtype(hf, monkeypatch):
    alone = dict(flatten(phivision_jax.load(hf, weights="int8", mesh={"data": 1})[0].split()[1]))
    monkeypatch.setattr(ours, "BLOCK_BYTES", 100)
    sharded = dict(flatten(phivision_jax.load(hf, weights="int8", mesh=ON_DEVICES, dtype="bfloat16")[0].split()[1]))
    assert sharded.keys() == alone.keys()
    for path, leaf in sharded.items():
        assert leaf.dtype == (jnp.int8 if alone[path].dtype == jnp.int8 else jnp.bfloat16)
        equal = (
            alone[path].astype(leaf.dtype) if "norm" in path or "bias" in path or "position" in path else alone[path]
        )
        np.testing.assert_array_equal(leaf.astype(jnp.float32), equal.astype(jnp.float32), err_msg=path)
    up, key = (sharded[f"decoder/layers/{name}/kernel"].sharding for name in ("mlp/up_proj", "self_attn/k_proj"))
    assert up.spec == PartitionSpec(None, "fsdp", "tensor") and key.spec == PartitionSpec(None, "fsdp", None, None)


def test_load_refuses_other_weights(hf):
    with pytest.raises(ValueError, match="weights 'int4' does not exist; choose int8 or None"):
        phivision_jax.load(hf, weights="int4")


MEASURE = """
import json, resource, sys, jax, phivision_jax
model, _ = phivision_jax.load(sys.argv[1], dtype="bfloat16", weights=sys.argv[2] or None)
arrays = sum(leaf.nbytes for leaf in jax.tree.leaves(model.split()[1]))
print(json.dumps([arrays, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))
"""


@pytest.mark.slow
def test_memory_of_loading_is_that_of_the_arrays(tmp_path):
    """3 GB whose largest array has 0.6: the interpreter, JAX and the blocks in flight take 0.6 GB or less."""
    subprocess.run([sys.executable, ROOT / "benchmarks/make_checkpoint.py", tmp_path / "hf", "--gb", "3"], check=True)
    subprocess.run(
        [sys.executable, "-m", "phivision_jax.cli", "convert", "to-jax", tmp_path / "hf", tmp_path / "ours"], check=True
    )
    for kind in ("hf", "ours"):
        for weights, size in (("", 3e9), ("int8", 1.5e9)):
            command = [sys.executable, "-c", MEASURE, str(tmp_path / kind), weights]
            run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
            arrays, peak = json.loads(run.stdout)
            assert abs(arrays - size) < 0.05 * size
            assert peak <= arrays + (0.6e9 if kind == "hf" else 0.9e9), (kind, weights)
