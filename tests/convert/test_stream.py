"""Complete conversions, in this process, of small checkpoints in the released layout."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from phivision_jax.checkpoint import layout, loading
from phivision_jax.config import ModelConfig
from phivision_jax.convert import jobs, ours
from phivision_jax.convert.hf_config import model_config
from phivision_jax.io import atomic
from tests.support.checkpoints import edit_meta, save_checkpoint
from tests.support.commands import Run, refused, succeeded
from tests.support.damage import abstract
from tests.support.parameter_trees import abstract_params, flatten, tree_from_hf
from tests.support.paths import ROOT
from tests.support.released_layout import (
    SMALL,
    any_config,
    random_tensors,
    read_tensors,
    same_directories,
    shapes_of,
    text_shapes,
    vision_shapes,
    write_hf,
    write_small,
)

BF16 = ml_dtypes.bfloat16


@pytest.mark.parametrize("dtype", [np.float32, BF16, np.float16])
@pytest.mark.parametrize("shards", [1, 3])
def test_convert_there_and_back_is_byte_exact(tmp_path: Path, run: Run, dtype: Any, shards: int) -> None:
    hf = write_small(tmp_path / "hf", dtype, shards)
    text = succeeded(run("to-jax", hf, tmp_path / "ours"))
    assert f"{len(shapes_of(SMALL))} tensors" in text and str(tmp_path / "ours") in text  # the plan
    succeeded(run("to-hf", tmp_path / "ours", tmp_path / "back", "--like", hf))
    assert same_directories(hf, tmp_path / "back")
    count = {1: 5, 3: 8}[shards]  # four sidecars, the shards, and their index if there are several
    assert f"{count} byte-identical, 0 different, 0 on one" in succeeded(run("verify", hf, tmp_path / "back"))
    succeeded(run("verify", hf, tmp_path / "ours"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "hf", "ours"]


@settings(max_examples=12)
@given(any_config(), st.integers(1, 5), st.sampled_from([np.float32, BF16]), st.sampled_from([40, 300, 32_000_000]))
def test_convert_any_size_sharding_and_block(values: dict[str, Any], shards: int, dtype: Any, block_bytes: int) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(ours, "BLOCK_BYTES", block_bytes)
        patch.setattr(atomic, "sync_tree", lambda directory: None)
        work = Path(folder)
        hf = write_hf(work / "hf", values, random_tensors(shapes_of(values), dtype), shards)
        jobs.to_jax(hf, work / "ours", "keep", overwrite=False)
        jobs.to_hf(work / "ours", work / "back", hf, "keep", 10**9, overwrite=False, force=False)
        assert same_directories(hf, work / "back")


def test_convert_keeps_special_bits(tmp_path: Path, run: Run) -> None:
    """NaNs with payloads, infinities, −0 and denormals; also an array of zeros, which a store may omit."""
    tensors = random_tensors(shapes_of(SMALL), np.float32)
    bits = np.array([0x7FC00001, 0xFF800001, 0x7F800000, 0x80000000, 1], np.uint32).view(np.float32)
    tensors["lm_head.weight"].reshape(-1)[:5] = bits
    tensors["model.norm.weight"][:] = 0
    hf = write_hf(tmp_path / "hf", SMALL, tensors)
    succeeded(run("to-jax", hf, tmp_path / "ours"))
    succeeded(run("to-hf", tmp_path / "ours", tmp_path / "back", "--like", hf))
    assert same_directories(hf, tmp_path / "back")
    succeeded(run("verify", hf, tmp_path / "ours"))


def test_to_jax_writes_assets_and_metadata(hf: Path, tmp_path: Path, run: Run) -> None:
    succeeded(run("to-jax", hf, tmp_path / "ours"))
    assets = tmp_path / "ours" / "assets"
    found = sorted(str(p.relative_to(assets)) for p in assets.rglob("*") if p.is_file())
    assert found == ["config.json", "figures/a.bin", "modeling_phi4_visionr.py", "tokenizer.json"]
    for name in found:
        assert (assets / name).read_bytes() == (hf / name).read_bytes()
    meta = json.loads((tmp_path / "ours" / "meta" / "metadata").read_text())
    assert (meta["format"], meta["step"]) == (layout.FORMAT, 0)
    assert ModelConfig.from_dict(meta["model"]) == model_config(SMALL)


def test_orbax_restores_conversion_onto_eight_devices(hf: Path, tmp_path: Path, run: Run) -> None:
    succeeded(run("to-jax", hf, tmp_path / "ours"))
    assert jax.device_count() == 8, "tests run with --xla_force_host_platform_device_count=8"
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def sharded(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        axes: list[str | None] = [None] * len(leaf.shape)
        for i in range(len(axes)):
            for axis, size in mesh.shape.items():
                if axes[i] is None and axis not in axes and leaf.shape[i] % size == 0:
                    axes[i] = axis
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    config, tensors = model_config(hf), read_tensors(hf)
    target = jax.tree.map(sharded, abstract_params(config))
    want = dict(flatten(tree_from_hf(tensors.__getitem__, config, vision_tail=True)))
    restored = ocp.StandardCheckpointer().restore(tmp_path / "ours" / "params", target)
    loaded = loading.read_params(hf, config, target)
    for tree in (restored, loaded):
        flat = dict(flatten(tree))
        assert flat.keys() == want.keys()
        for path, leaf in flatten(target):
            assert flat[path].sharding == leaf.sharding, path
            np.testing.assert_array_equal(flat[path], want[path], err_msg=path)
    composite = ocp.CompositeCheckpointHandler(params=ocp.StandardCheckpointHandler(), meta=ocp.JsonCheckpointHandler())
    args = ocp.args.Composite(params=ocp.args.StandardRestore(target), meta=ocp.args.JsonRestore())
    restored = ocp.Checkpointer(composite).restore(tmp_path / "ours", args=args)
    assert restored.meta["step"] == 0
    assert dict(flatten(restored.params)).keys() == want.keys()


def test_read_params_casts_without_tail(hf: Path) -> None:
    target = abstract(abstract_params(model_config(hf), BF16, vision_tail=False))
    params = loading.read_params(hf, model_config(hf), target)
    assert set(params) == {"vision", "projector", "decoder"}
    want = read_tensors(hf)["model.mm_projector.0.weight"].T.astype(BF16)
    np.testing.assert_array_equal(params["projector"]["fc1"]["kernel"], want)
    with pytest.raises(ValueError, match="mis-shaped"):
        loading.read_params(hf, model_config({**SMALL, "intermediate_size": 28}), target)


@pytest.mark.parametrize(
    "save_args", [None, ocp.SaveArgs(chunk_byte_size=512, shard_axes=(0,)), ocp.SaveArgs(chunk_byte_size=64)]
)
@pytest.mark.parametrize("ocdbt", [True, False])
def test_to_hf_takes_newest_step_of_run(hf: Path, tmp_path: Path, run: Run, save_args: Any, ocdbt: bool) -> None:
    config = model_config(hf)
    params = jax.tree.map(jax.numpy.asarray, tree_from_hf(read_tensors(hf).__getitem__, config, vision_tail=True))
    for step, tree in ((9, jax.tree.map(lambda x: x * 0, params)), (10, params)):
        folder = tmp_path / "run" / "checkpoints" / str(step)
        save_checkpoint(folder, tree, config, {"step": step, "plan": "abc"}, save_args=save_args, use_ocdbt=ocdbt)
    text = succeeded(run("to-hf", tmp_path / "run", tmp_path / "back", "--like", hf))
    assert "taking the newest step, 10" in text
    assert same_directories(hf, tmp_path / "back")


def test_to_hf_new_shards_load_with_safetensors(hf: Path, tmp_path: Path, run: Run) -> None:
    succeeded(run("to-jax", hf, tmp_path / "ours"))
    succeeded(run("to-hf", tmp_path / "ours", tmp_path / "new", "--max-shard-size", "1e-5"))
    index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())
    want, got = read_tensors(hf), read_tensors(tmp_path / "new")
    assert index["weight_map"].keys() == got.keys() == want.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in want.values())
    for file in set(index["weight_map"].values()):
        held = [name for name, where in index["weight_map"].items() if where == file]
        assert len(held) == 1 or sum(want[name].nbytes for name in held) <= 10_000
    for name in want:
        np.testing.assert_array_equal(got[name], want[name])
    assert (tmp_path / "new" / "config.json").read_bytes() == (hf / "config.json").read_bytes()
    succeeded(run("to-jax", tmp_path / "new", tmp_path / "again"))
    succeeded(run("verify", tmp_path / "ours", tmp_path / "again"))


def test_convert_casts_dtype(hf: Path, tmp_path: Path, run: Run) -> None:
    succeeded(run("to-jax", hf, tmp_path / "ours", "--dtype", "bfloat16"))
    succeeded(run("to-hf", tmp_path / "ours", tmp_path / "new"))
    want = read_tensors(hf)
    for name, tensor in read_tensors(tmp_path / "new").items():
        np.testing.assert_array_equal(tensor, want[name].astype(BF16))
    assert json.loads((tmp_path / "new" / "config.json").read_text()) == {**SMALL, "dtype": "bfloat16"}
    code, text = run("verify", hf, tmp_path / "ours")
    assert code == 1 and "largest error" in text
    succeeded(run("to-hf", tmp_path / "ours", tmp_path / "wide", "--dtype", "float32"))
    text = succeeded(run("verify", tmp_path / "wide", tmp_path / "ours"))
    assert "0 tensors with identical bytes, 89 with equal values in other bytes" in text
    refused(run("to-hf", tmp_path / "ours", tmp_path / "x", "--like", hf), "pass --dtype float32")
    contradiction = ("--like", hf, "--dtype", "bfloat16")
    refused(run("to-hf", tmp_path / "ours", tmp_path / "x", *contradiction), "--dtype bfloat16 contradicts it")


def test_to_jax_composes_phi4_and_siglip2(tmp_path: Path, run: Run) -> None:
    v = SMALL["vision_config"]
    text = {k: x for k, x in SMALL.items() if k != "vision_config" and "mm_" not in k and "patches" not in k}
    text["model_type"] = "phi3"
    decoder = random_tensors(text_shapes(16, 24, 3, 4, 2, 48), BF16)
    vision = random_tensors(vision_shapes(12, 20, 3, 2, 4, prefix="vision_model"), np.float32)
    other = {"text_model.head.weight": np.ones((2, 2), np.float32), "logit_scale": np.ones(1, np.float32)}
    write_hf(tmp_path / "phi4", text, decoder, 2)
    write_hf(tmp_path / "siglip2", {"model_type": "siglip2", "vision_config": v}, vision | other, 1)
    parts = ("--decoder", tmp_path / "phi4", "--vision", tmp_path / "siglip2")
    output = succeeded(run("to-jax", tmp_path / "start", *parts, "--seed", "7"))
    assert "ignoring 2 tensors" in output
    succeeded(run("to-hf", tmp_path / "start", tmp_path / "hf"))
    got = read_tensors(tmp_path / "hf")
    assert got.keys() == shapes_of(SMALL).keys()
    for name, tensor in decoder.items():
        np.testing.assert_array_equal(got.pop(name), tensor)
    for name, tensor in vision.items():
        np.testing.assert_array_equal(got.pop(f"model.vision_tower.vision_tower.{name}"), tensor)
    assert not got["model.mm_projector.0.bias"].any() and not got["model.mm_projector.2.bias"].any()
    for name, inputs in (("model.mm_projector.0.weight", 12), ("model.mm_projector.2.weight", 16)):
        assert got[name].dtype == BF16
        assert 0.8 < got[name].astype(np.float32).std() * inputs**0.5 < 1.2
    succeeded(run("to-jax", tmp_path / "same", *parts, "--seed", "7"))
    succeeded(run("verify", tmp_path / "start", tmp_path / "same"))
    succeeded(run("to-jax", tmp_path / "other", *parts, "--seed", "8"))
    code, output = run("verify", tmp_path / "start", tmp_path / "other")
    assert code == 1 and output.count("different: model.mm_projector") == 2
    extra = random_tensors({"text_extra.weight": (2, 2)}, np.float32)
    write_hf(tmp_path / "bad", {"model_type": "siglip2", "vision_config": v}, vision | extra, 1)
    refused(
        run("to-jax", tmp_path / "x", "--decoder", tmp_path / "phi4", "--vision", tmp_path / "bad"),
        "1 extra: text_extra.weight",
    )


def test_to_hf_needs_force_for_bidirectional(hf: Path, tmp_path: Path, run: Run) -> None:
    succeeded(run("to-jax", hf, tmp_path / "ours"))
    model = layout.read_meta(tmp_path / "ours")["model"]
    edit_meta(tmp_path / "ours", model=model | {"image_attention": "bidirectional"})
    for like in ((), ("--like", hf)):
        code, text = run("to-hf", tmp_path / "ours", tmp_path / "back", *like)
        assert code == 2 and "bidirectional" in text and not (tmp_path / "back").exists()
        succeeded(run("to-hf", tmp_path / "ours", tmp_path / "back", "--force", "--overwrite", *like))
        assert read_tensors(tmp_path / "back").keys() == shapes_of(SMALL).keys()
        shutil.rmtree(tmp_path / "back")


def test_verify_and_inspect_name_tensors(hf: Path, tmp_path: Path, run: Run) -> None:
    tensors = read_tensors(hf)
    changed = tensors["model.layers.1.mlp.gate_up_proj.weight"]
    changed[30, 3], changed[40, 5] = 2.0, np.nan
    before = read_tensors(hf)["model.layers.1.mlp.gate_up_proj.weight"][30, 3]
    other = write_hf(tmp_path / "other", SMALL, tensors)
    (other / "tokenizer.json").write_text("{}")
    code, text = run("verify", hf, other)
    assert code == 1
    assert text.count("different: ") == 1
    where = "2 of 768 values, the first at [30, 3], largest error inf, relative inf"
    assert f"different: model.layers.1.mlp.gate_up_proj.weight, {where}" in text
    assert "2 different" in text and "tokenizer.json" in text  # a shard, and this
    changed[40, 5] = read_tensors(hf)["model.layers.1.mlp.gate_up_proj.weight"][40, 5]
    text = run("verify", hf, write_hf(tmp_path / "third", SMALL, tensors))[1]
    error = abs(2.0 - before)
    assert f"1 of 768 values, the first at [30, 3], largest error {error:.3g}, relative {error / 2:.3g}" in text
    succeeded(run("to-jax", hf, tmp_path / "ours"))
    for path in (hf, tmp_path / "ours"):
        code, text = run("inspect", path, "--json")
        found = json.loads(text)
        shapes = {name: tuple(value["shape"]) for name, value in found["tensors"].items()}
        assert shapes == shapes_of(SMALL)
        assert found["parameters"] * 4 == found["bytes"]
        assert f"{len(shapes)} tensors" in succeeded(run("inspect", path))


def test_verify_compares_headers_and_files(tmp_path: Path, run: Run) -> None:
    hf, other = write_small(tmp_path / "hf"), write_small(tmp_path / "other")
    for name, old, new in (
        ("model-00002-of-00003.safetensors", "ü".encode(), b"ue"),
        ("tokenizer.json", b"not", b"Not"),
    ):
        data = (other / name).read_bytes()
        assert data.count(old) == 1
        (other / name).write_bytes(data.replace(old, new))
    code, text = run("verify", hf, other)
    assert code == 1 and "6 byte-identical, 2 different, 0 on one side only" in text
    assert "89 tensors with identical bytes" in text


def test_verify_names_fields(hf: Path, tmp_path: Path, run: Run) -> None:
    tensors = read_tensors(hf)
    other = write_hf(tmp_path / "other", {**SMALL, "rope_theta": 1e4, "max_num_patches": 25}, tensors)
    code, text = run("verify", hf, other)
    assert code == 1 and "89 tensors with identical bytes" in text
    assert "configuration: decoder.rope_theta is 500000.0 and 10000.0\n" in text
    assert "configuration: max_patches is 16 and 25\n" in text
    longer = SMALL | {"num_hidden_layers": 4}
    write_hf(tmp_path / "longer", longer, random_tensors(shapes_of(longer), np.float32))
    refused(run("verify", hf, tmp_path / "longer"), "are different architectures: decoder.num_layers is 3 and 4")


def test_inspect_prints_full_names(hf: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tensor has a line of its own where the output is read by a program; a terminal shows layers together."""
    monkeypatch.setenv("COLUMNS", "40")
    lines = [line.split()[0] for line in succeeded(run("inspect", hf)).splitlines() if "  [" in line]
    assert set(shapes_of(SMALL)) == set(lines)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    text = succeeded(run("inspect", hf))
    assert "model.layers.{0..2}.mlp.down_proj.weight" in text and "model.mm_projector.0.weight" in text
    assert ".encoder.layers.{0..2}.mlp.fc1.bias" in text and ".layers.1." not in text


def test_to_jax_of_hub_id_prints_download_command(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused(
        run("to-jax", "microsoft/Phi-4-reasoning-vision-15B", tmp_path / "ours"),
        "hf download microsoft/Phi-4-reasoning-vision-15B --local-dir Phi-4-reasoning-vision-15B",
    )


def test_convert_py_of_user_does_not_run(hf: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "convert.py").write_text("raise SystemExit('the wrong module')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "convert", raising=False)
    succeeded(run("inspect", hf))
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert packages == {"packages": ["phivision_jax"]}  # no top-level package convert


def test_export_writes_generation_config(hf: Path, tmp_path: Path, run: Run) -> None:
    generation = {"eos_token_id": [46, 44], "temperature": 0.8}
    (hf / "generation_config.json").write_text(json.dumps(generation))
    succeeded(run("to-jax", hf, tmp_path / "ours"))
    (hf / "generation_config.json").unlink()
    succeeded(run("to-jax", hf, tmp_path / "without"))
    succeeded(run("to-hf", tmp_path / "ours", tmp_path / "kept"))
    assert json.loads((tmp_path / "kept" / "generation_config.json").read_text()) == generation
    assert json.loads((tmp_path / "kept" / "config.json").read_text())["eos_token_id"] == 46
    model = layout.read_meta(tmp_path / "without")["model"]
    model["decoder"]["stop_token_ids"] = [44]
    edit_meta(tmp_path / "without", model=model)
    succeeded(run("to-hf", tmp_path / "without", tmp_path / "made"))
    written = json.loads((tmp_path / "made" / "generation_config.json").read_text())
    assert written["eos_token_id"] == [46, 44] and written["pad_token_id"] == 47
