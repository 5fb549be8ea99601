"""A run's checkpoint with adapters answers as the adapted model after export and after loading."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from safetensors.numpy import load_file

import phivision_jax
from phivision_jax import sharding
from phivision_jax.checkpoint import loading
from phivision_jax.config import LoraConfig
from phivision_jax.convert import ours
from phivision_jax.io import storage
from phivision_jax.models import lora, phivision
from phivision_jax.models.siglip2 import VisionTail
from phivision_jax.training import optim
from tests.support.batches import EXAMPLES, TINY, random_rows
from tests.support.checkpoints import edit_meta, save_checkpoint
from tests.support.commands import Run, refused, succeeded
from tests.support.parameter_trees import hf_tensors
from tests.support.released_layout import read_tensors
from tests.support.train_steps import QUICK

# Every kind of kernel: [in, out], heads among the outputs, heads among the inputs, stacked and not.
LORA = LoraConfig(rank=3, alpha=6.0, targets="_proj|fc[12]")


@pytest.fixture(scope="module")
def model(tiny: phivision.PhiVision) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """The structure and parameters of ``tiny`` with adapters that change its answers."""
    graphdef, state = phivision.abstract(TINY, lora=LORA)
    rng = np.random.default_rng(0)
    params = optim.flatten(tiny.split()[1])
    for path, leaf in optim.flatten(nnx.to_pure_dict(state)).items():
        if lora.is_adapter(path):
            params[path] = jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32)
    return graphdef, optim.unflatten(params)


@pytest.fixture(scope="module")
def params_of_step(model: tuple[nnx.GraphDef, dict[str, Any]]) -> dict[str, Any]:
    """The content of a checkpoint's params/."""
    tail = nnx.eval_shape(lambda: VisionTail(TINY.vision, rngs=nnx.Rngs(0)))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), nnx.to_pure_dict(nnx.state(tail, nnx.Param)))
    return {**model[1], "vision_tail": zeros}


def save(folder: Path, params: dict[str, Any], chunk_bytes: int = 32_000_000, run: Any = None) -> Path:
    """Save a step of a run; a small ``chunk_bytes`` gives several chunks per layer."""
    chunks = ocp.SaveArgs(chunk_byte_size=chunk_bytes, shard_axes=(0,))
    run = {"lora": dataclasses.asdict(LORA)} if run is None else run
    return save_checkpoint(folder, params, TINY, {"step": 7, "run": run}, save_args=chunks)


@pytest.fixture(scope="module")
def step(params_of_step: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("step") / "run" / "checkpoints" / "7", params_of_step, 128)


@pytest.fixture
def checkpoint(step: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(step, tmp_path / "checkpoint")


def answers(model: phivision.PhiVision) -> np.ndarray:
    batch = random_rows(np.random.default_rng(3), TINY, [EXAMPLES[:3], EXAMPLES[3:]])
    return np.asarray(logits(*model.split(), batch))


logits = jax.jit(
    lambda graphdef, params, batch: phivision.merge(graphdef, params)(batch), static_argnums=0, compiler_options=QUICK
)


def test_to_hf_and_load_merge_adapters(step: Path, model: Any, tmp_path: Path, run: Run) -> None:
    code, text = run("to-hf", step.parents[1], tmp_path / "hf")
    assert code == 0 and "adapters of rank 3, alpha 6, on 15 kernels; they are merged" in text, text
    want = answers(phivision.merge(*model))
    for path in (tmp_path / "hf", step.parents[1]):
        loaded, _ = phivision_jax.load(path)
        assert not any(map(lora.is_adapter, optim.flatten(loaded.split()[1])))
        assert np.abs(answers(loaded) - want).max() <= 1e-4
    code, text = run("verify", step, tmp_path / "hf")
    assert code == 0 and "same" in text, text
    code, text = run("inspect", step, "--json")
    found = json.loads(text.splitlines()[0])
    assert code == 0 and not any("lora" in name for name in found["tensors"])
    assert found["num_tensors"] == len(read_tensors(tmp_path / "hf"))


def test_adapters_only_merge_by_hand_into_base(step: Path, params_of_step: Any, tmp_path: Path, run: Run) -> None:
    """W + alpha / r · B · A with PEFT's names, ranks and scales is the weight of the merged export."""
    succeeded(run("to-hf", step.parents[1], tmp_path / "merged"))
    succeeded(run("to-hf", step.parents[1], tmp_path / "peft", "--adapters-only"))
    assert sorted(path.name for path in (tmp_path / "peft").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors"
    ]  # fmt: skip
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["bias"]) == ("LORA", 3, 6.0, "none")
    adapters, weights = load_file(tmp_path / "peft" / "adapter_model.safetensors"), read_tensors(tmp_path / "merged")
    for name, base in hf_tensors(lora.without(params_of_step), TINY):
        module = name.removesuffix(".weight")
        if module in config["target_modules"]:
            a, b = (adapters.pop(f"base_model.model.{module}.lora_{x}.weight") for x in "AB")
            rank = config["rank_pattern"].get(module, config["r"])
            assert a.shape == (rank, base.shape[1]) and b.shape == (base.shape[0], rank)
            base = base + config["alpha_pattern"].get(module, config["lora_alpha"]) / rank * b @ a
            assert rank == {"qkv_proj": 9, "gate_up_proj": 6}.get(module.rpartition(".")[2], 3)
        np.testing.assert_allclose(weights[name], base, rtol=1e-6, atol=1e-6, err_msg=name)
    assert not adapters and len(config["target_modules"]) == 2 * 4 + 2 * 6 + 2
    refused(run("to-hf", step, tmp_path / "x", "--adapters-only", "--like", tmp_path / "merged"), "does not go with")
    refused(run("inspect", tmp_path / "peft"), "holds a PEFT adapter")
    refused(run("to-hf", save(tmp_path / "plain", lora.without(params_of_step)), tmp_path / "x", "--adapters-only"),
            "has no adapters")  # fmt: skip


def test_export_of_run_has_model_card(step: Path, checkpoint: Path, tmp_path: Path, run: Run) -> None:
    trained = {"init_from": "org/base|x", "data": {"path": "data/mine"}, "lora": dataclasses.asdict(LORA)}
    (checkpoint / "assets").mkdir(exist_ok=True)
    edit_meta(
        checkpoint, run=trained, metrics={"loss": 1.5, "validation/loss": 1.25, "time/step_s": 3.0}, code="0.1.0 abc"
    )
    succeeded(run("to-hf", checkpoint, tmp_path / "mine-hf"))
    card = (tmp_path / "mine-hf" / "README.md").read_text()
    assert card.startswith('---\nbase_model: "org/base|x"\nlibrary_name: transformers\n')
    rows = ["base model | org/base/x", "data | data/mine", "steps | 7", "loss | 1.5", "validation/loss | 1.25"]
    assert "# mine-hf\n" in card and all(f"| {row} |\n" in card for row in [*rows, "program | 0.1.0 abc"])
    assert "LoRA, rank 3" in card and "step_s" not in card


def test_bucket_merges_adapters(step: Path, params_of_step: Any, bucket: str, run: Run) -> None:
    storage.upload(step.parents[1], storage.location(f"{bucket}/run"))
    (storage.location(f"{bucket}/run") / "checkpoints" / "7" / "commit_success.txt").write_text("by a run")
    code, text = run("verify", f"{bucket}/run", step)
    assert code == 0 and text.count("they are merged") == 2 and "taking the newest step, 7" in text, text
    paths = [("decoder", "layers", "mlp", "up_proj", "kernel"), ("decoder", "norm", "scale")]
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    flat = optim.flatten(params_of_step)
    target = {path: jax.ShapeDtypeStruct(flat[path].shape, jnp.float32, sharding=place) for path in paths}
    theirs, ours = (
        optim.flatten(loading.read_params(loading.locate(where), TINY, optim.unflatten(target)))
        for where in (f"{bucket}/run", step)
    )
    for path in paths:
        np.testing.assert_array_equal(theirs[path], ours[path])
    assert np.abs(np.asarray(theirs[paths[0]]) - np.asarray(flat[paths[0]])).max() > 0.1  # the adapters' contribution


@pytest.mark.parametrize(("block_bytes", "dtype"), [(100, "float32"), (700, "bfloat16")])
def test_to_hf_merges_every_block(
    step: Path, params_of_step: Any, tmp_path: Path, run: Run, monkeypatch: Any, block_bytes: int, dtype: str
) -> None:
    monkeypatch.setattr(ours, "BLOCK_BYTES", block_bytes)
    code, text = run("to-hf", step, tmp_path / "hf", "--dtype", dtype)
    assert code == 0, text
    got = read_tensors(tmp_path / "hf")
    for name, want in hf_tensors(lora.merge(params_of_step, LORA), TINY):
        # Sums of three products in another order; bf16 is rounded once, from fp32.
        rtol = 1e-6 if dtype == "float32" else 1.001 * 2**-8
        np.testing.assert_allclose(got[name].astype(np.float32), want, rtol, atol=1e-6, err_msg=name)


def test_read_params_merges_onto_shardings(step: Path, params_of_step: Any) -> None:
    """On fsdp 4 × tensor 2, in bfloat16, rounded once from fp32."""
    _, state = phivision.abstract(TINY)
    shardings = optim.flatten(sharding.param_shardings(state, sharding.make_mesh({"fsdp": 4, "tensor": 2})))
    want = optim.flatten(lora.merge(params_of_step, LORA))
    names = ("layers/self_attn/o_proj/kernel", "layers/mlp/up_proj/kernel", "norm/scale")
    paths = [("decoder", *name.split("/")) for name in names] + [("projector", "fc1", "kernel")]
    target = {path: jax.ShapeDtypeStruct(want[path].shape, jnp.bfloat16, sharding=shardings[path]) for path in paths}
    read = optim.flatten(loading.read_params(step, TINY, optim.unflatten(target)))
    assert read.keys() == set(paths)
    for path, leaf in read.items():
        assert leaf.sharding.is_equivalent_to(shardings[path], leaf.ndim) and leaf.dtype == jnp.bfloat16
        np.testing.assert_allclose(leaf.astype(np.float32), want[path], 1.001 * 2**-8, atol=1e-6)


def test_int8_is_that_of_merged_kernels(step: Path, params_of_step: Any) -> None:
    module = phivision_jax.load(step, weights="int8")[0].split()[1]["decoder"]["layers"]["mlp"]["up_proj"]
    want = lora.merge(params_of_step, LORA)["decoder"]["layers"]["mlp"]["up_proj"]["kernel"]
    scale = np.asarray(module["scale"])[:, None]
    assert module["kernel"].dtype == np.int8
    assert (np.abs(module["kernel"] * scale - want) <= 0.51 * scale).all()


def test_adapters_need_rank_and_alpha_in_metadata(checkpoint: Path, tmp_path: Path, run: Run) -> None:
    for run_meta in ({}, {"lora": None}):
        edit_meta(checkpoint, run=run_meta)
        code, text = run("to-hf", checkpoint, tmp_path / "hf")
        assert code == 2 and "kernel has an adapter, but meta/metadata lacks the run's lora (rank, alpha)" in text
        with pytest.raises(ValueError, match=r"kernel has an adapter, but meta/metadata lacks the run's lora"):
            phivision_jax.load(checkpoint)
    edit_meta(checkpoint, run={"lora": {**dataclasses.asdict(LORA), "rank": 2}})
    code, text = run("inspect", checkpoint)
    assert code == 2 and "30 mis-shaped: " in text and "lora_a [" in text
    with pytest.raises(ValueError, match=r" mis-shaped: .*lora_a \["):
        phivision_jax.load(checkpoint)


def test_to_hf_refuses_misplaced_adapters(params_of_step: dict[str, Any], tmp_path: Path, run: Run) -> None:
    flat = optim.flatten(params_of_step)
    del flat["decoder", "layers", "mlp", "up_proj", "lora_b"]
    for name in ("lora_a", "lora_b"):
        flat["decoder", "lm_head", name] = jnp.zeros((3, 32))
    code, text = run("to-hf", save(tmp_path / "bad", optim.unflatten(flat)), tmp_path / "hf")
    assert code == 2 and "1 missing: decoder/layers/mlp/up_proj/lora_b" in text, text
    assert "2 extra: decoder/lm_head/lora_a, decoder/lm_head/lora_b" in text
