"""``load``: a model and its processor from wherever its weights are.

A checkpoint of a training with adapters (LoRA) is merged as it is read. So whatever starts from it has one kind of
model, answers in the time of one, and a training that starts from it begins where that one ended, with or without
adapters of its own.

A step of a training has a manifest: whatever is read of it here has its files checked first, and is refused where one
is not as it was written. The optimizer's state is neither read nor checked.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from phivision_jax import sharding
from phivision_jax.checkpoint import layout, manifest
from phivision_jax.config import ImageAttention, LoraConfig, ModelConfig, dataclass_from_dict
from phivision_jax.convert.hf_config import model_config
from phivision_jax.distributed.processes import first_error
from phivision_jax.io import storage
from phivision_jax.io.storage import Location
from phivision_jax.models import lora, phivision
from phivision_jax.models.phivision import PhiVision
from phivision_jax.processor import Processor


def load(
    path_or_hub_id: str | Location,
    *,
    dtype: Any = None,
    param_dtype: Any = None,
    mesh: Mesh | None = None,
    remat: str = "none",
    image_attention: ImageAttention | None = None,
) -> tuple[PhiVision, Processor]:
    """Load a model for inference, analysis or further training.

    Args:
      path_or_hub_id: a Hugging Face directory, a checkpoint of ours, a training run (its newest step), each on this
        machine or in a bucket (``gs://…``), or, with the ``[hub]`` extra, a Hugging Face id.
      dtype: of the computation; default: float32 on CPU, bfloat16 elsewhere.
      param_dtype: of the parameters in memory; default: ``dtype``.
      mesh: to shard the parameters over (``sharding.make_mesh``); default: one device.
      remat: as in ``PhiVision``, for both towers.
      image_attention: "causal" or "bidirectional"; default: what the checkpoint says (a Hugging Face one: causal).

    Returns:
      The model and its processor, which has no tokenizer where the checkpoint has none.

    Raises:
      ValueError: when there is nothing to load there, or it is damaged; the message names the file or tensor.
      StorageError: when a bucket cannot be read; the message says what to do.
    """
    dtype = jnp.dtype(dtype or (jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16))
    param_dtype = jnp.dtype(param_dtype or dtype)
    path = locate(path_or_hub_id)
    config = config_of(path)
    if image_attention is not None:
        config = dataclasses.replace(config, image_attention=image_attention)
    graphdef, state = phivision.abstract(config, dtype=dtype, remat=remat, vision_remat=remat)
    at = sharding.param_shardings(state, mesh or sharding.make_mesh(devices=jax.devices()[:1]))
    target = sharding.abstract(nnx.to_pure_dict(state), at, param_dtype)
    processor = processor_of(path, config)  # first: a tokenizer that is damaged is known before all weights are read
    return phivision.merge(graphdef, read_params(path, config, target)), processor


def locate(path_or_hub_id: str | Location) -> Location:
    """A directory with weights: a Hugging Face one, or a checkpoint of ours (of a run, the newest step).

    Raises:
      ValueError: when there is no such directory, or nothing in it.
    """
    path = storage.location(path_or_hub_id)
    storage.check(path)
    if path.is_dir():
        with storage.wrap_storage_errors(path):
            return path if is_hf(path) else layout.find(path)
    name = str(path_or_hub_id)
    if storage.is_remote(path):
        raise ValueError(f"{name} is not a directory: nothing in the bucket begins with {name.rstrip('/')}/")
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")) or path.parent.is_dir():
        raise ValueError(
            f"{name} is not a directory; give a checkpoint, a Hugging Face directory, or an id like org/name"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(
            f"{name} is not a directory; to download it from the Hugging Face hub, pip install 'phivision_jax[hub]'"
        ) from None
    # Weights and text files only: remote code is never fetched, let alone run.
    patterns = ["*.safetensors", "*.json", "*.jinja", "*.txt"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub's many kinds: no network, no such repository, no permission
        raise ValueError(f"{name} could not be downloaded from the Hugging Face hub: {error}") from error


def is_hf(path: Location) -> bool:
    return (path / "config.json").is_file()


def config_of(path: Location) -> ModelConfig:
    """The configuration of a located directory; raises ``ValueError`` where it is damaged."""
    with storage.wrap_storage_errors(path):
        if is_hf(path):
            return model_config(path)
        manifest.check(path, [layout.META])
        return layout.read_meta(path)[0]


def processor_of(path: Location, config: ModelConfig) -> Processor:
    """The processor of a located directory; raises ``ValueError`` where it is damaged."""
    return Processor.from_directory(_sidecars(path), config)


def _sidecars(path: Location) -> Location:
    """Where the files beside the weights are; in a checkpoint of ours, checked."""
    if is_hf(path):
        return path
    manifest.check(path, [layout.ASSETS])
    return layout.assets_of(path)


def copy_assets(path: Location, to: Path) -> None:
    """Copy what a located directory holds beside its weights, so that what starts from it can be exported again.

    Raises:
      ValueError: when one of these files is damaged; nothing is copied then.
    """
    weights = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt", ".git", ".cache", layout.ORBAX_MARK)
    source = _sidecars(path)
    to.mkdir(parents=True, exist_ok=True)
    for name in storage.files(source):
        if not any(fnmatch.fnmatch(part, weight) for part in PurePosixPath(name).parts for weight in weights):
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            with storage.wrap_storage_errors(source / name):
                (to / name).write_bytes((source / name).read_bytes())


def read_params(path: Location, config: ModelConfig, target: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a located directory, in ``target``'s dtype and shardings.

    The vision tail is read where ``target`` names it; adapters that ``target`` does not name are merged. Of several
    processes all call this: each checks a share of the files.

    Raises:
      ValueError: as ``restore_params``, or ``load_hf_params``.
    """
    if is_hf(path):
        from phivision_jax.checkpoint.load_hf import load_hf_params

        shardings = jax.tree.map(lambda leaf: leaf.sharding, target)
        dtype = jax.tree.leaves(target)[0].dtype
        return load_hf_params(path, config, shardings, dtype, vision_tail="vision_tail" in target)
    with storage.wrap_storage_errors(path):
        return restore_params(path, target)


def restore_params(directory: Location, target: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that ``target`` names, in its dtypes and shardings; others in the checkpoint are not read.

    Adapters that it does not name, to kernels that it does, are merged into these, in fp32.

    Args:
      target: nested dict of ``jax.ShapeDtypeStruct`` (with shardings, or all go to one device).

    Raises:
      ValueError: when a file is damaged, an array is missing or has another shape, or the metadata do not say how to
        merge.
    """
    parts = (layout.PARAMS, layout.META)
    manifest.check(directory, parts, jax.process_index(), jax.process_count(), first_error)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        metadata = checkpointer.metadata(storage.absolute(directory) / layout.PARAMS)
    if metadata.item_metadata is None:
        raise ValueError(f"{directory}: {layout.PARAMS}/ is no Orbax checkpoint, or one that was never finished")
    found = dict(metadata.item_metadata.tree)
    _check_shapes(directory, found, target)
    stored, wanted = nnx.traversals.flatten_mapping(found), nnx.traversals.flatten_mapping(target)
    adapted = [
        (*path[:-1], "kernel")
        for path in stored
        if path[-1] == lora.A and path not in wanted and (*path[:-1], "kernel") in wanted
    ]
    # The adapted kernels first and one by one: merging takes twice their size in fp32, while the rest is not there.
    merged = {kernel: _restore_merged(directory, kernel, stored, wanted[kernel]) for kernel in adapted}
    others = {path: leaf for path, leaf in wanted.items() if path not in merged}
    return nnx.traversals.unflatten_mapping({**_restore(directory, others), **merged})


def _restore_merged(directory: Location, kernel: tuple, stored: Mapping[tuple, Any], wanted: Any) -> jax.Array:
    """One kernel with its adapter merged."""
    cfg = _lora_of(directory, kernel)
    at = wanted.sharding
    everywhere = NamedSharding(at.mesh, PartitionSpec()) if isinstance(at, NamedSharding) else at
    target = {
        path: jax.ShapeDtypeStruct(tuple(stored[path].shape), jnp.float32, sharding=place)
        for path, place in ((kernel, at), ((*kernel[:-1], lora.A), everywhere), ((*kernel[:-1], lora.B), everywhere))
    }
    make = jax.jit(lambda tree: lora.merge(tree, cfg)["kernel"].astype(wanted.dtype), out_shardings=at)
    return make({path[-1]: array for path, array in _restore(directory, target).items()})


def _lora_of(directory: Location, kernel: tuple) -> LoraConfig:
    """What a run says of its adapters."""
    values = layout.read_meta(directory)[1].get("run", {}).get("lora")
    if values is None:
        raise ValueError(
            f"{directory}: {'/'.join(kernel)} has an adapter, but meta/metadata lacks the run's lora (rank, alpha)"
        )
    return dataclass_from_dict(LoraConfig, values)


def _restore(directory: Location, target: Mapping[tuple, Any]) -> dict[tuple, jax.Array]:
    """These paths alone."""
    item = nnx.traversals.unflatten_mapping(target)
    restore_args = ocp.checkpoint_utils.construct_restore_args(item)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        args = ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True)
        params = checkpointer.restore(storage.absolute(directory) / layout.PARAMS, args=args)
    return nnx.traversals.flatten_mapping(params)


def _check_shapes(directory: Location, found: Mapping[str, Any], target: Mapping[str, Any], prefix: str = "") -> None:
    for name, wanted in target.items():
        path = f"{prefix}{name}"
        if name not in found:
            raise ValueError(f"{directory}: the model needs {path}, which the checkpoint does not hold")
        if isinstance(wanted, Mapping):
            _check_shapes(directory, found[name], wanted, f"{path}/")
        elif tuple(found[name].shape) != tuple(wanted.shape):
            raise ValueError(f"{directory}: {path} is {tuple(found[name].shape)}, the model's {tuple(wanted.shape)}")
