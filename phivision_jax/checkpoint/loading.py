"""Load a model and its processor from a Hugging Face directory, a conversion or a training run.

Adapters (LoRA) of a training run are merged as they are read: a loaded model has no adapters and answers as fast as any
other, and a run that starts from such a checkpoint begins with the merged weights, with or without adapters of its own.

Everything that is read is verified (``layout.py``); the optimizer state is neither read nor verified.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from phivision_jax import sharding
from phivision_jax.checkpoint import arrays, layout
from phivision_jax.checkpoint.layout import PARAMS, Array
from phivision_jax.config import ImageAttention, LoraConfig, ModelConfig
from phivision_jax.convert.hf import HFDirectory, HFSource, find_ours, is_asset
from phivision_jax.convert.hf_config import is_hf, model_config
from phivision_jax.convert.jobs import copy_file
from phivision_jax.convert.mapping import Leaf, model_leaves
from phivision_jax.convert.ours import Adapters, adapter_paths, block_rows
from phivision_jax.convert.stream import WORKERS
from phivision_jax.io import storage
from phivision_jax.io.storage import Location
from phivision_jax.models import lora, phivision
from phivision_jax.models.phivision import PhiVision
from phivision_jax.processor import Processor

_BATCH_BYTES = 4 << 30
"""Parameters are restored in batches of about this size per device: in their stored dtype, before they are cast."""


def load(
    path_or_hub_id: str | Location,
    *,
    dtype: Any = None,
    param_dtype: Any = None,
    mesh: Mesh | Mapping[str, int] | None = None,
    remat: str = "none",
    image_attention: ImageAttention | None = None,
) -> tuple[PhiVision, Processor]:
    """Load a model for inference, analysis or further training.

    Args:
      path_or_hub_id: a Hugging Face directory, a converted checkpoint, a training run (its newest step), each on disk
        or in a bucket (``gs://…``), or, with the ``[hub]`` extra, a Hugging Face id.
      dtype: of the computation; default: float32 on CPU, bfloat16 elsewhere.
      param_dtype: of the parameters in memory; default: ``dtype``.
      mesh: to shard the parameters over, or the sizes of its axes, as {"fsdp": 4, "tensor": 2}, on the first devices of
        this process; default: all of these, with as few shards of the weights as leave room for a cache
        (``sharding.generation_sizes``). ``generate`` uses the mesh that the parameters are on; other calls of a model
        on several devices need ``with jax.set_mesh(sharding.mesh_of(params)):``.
      remat: as in ``PhiVision``, for both towers.
      image_attention: "causal" or "bidirectional"; default: as in the checkpoint (a Hugging Face one is causal).

    Returns:
      The model and its processor, which has no tokenizer if the checkpoint has none.

    Raises:
      ValueError: when there is nothing to load, or it is damaged; the message names the file or array.
      StorageError: when a bucket cannot be read; the message suggests a remedy.
    """
    dtype = jnp.dtype(dtype or (jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16))
    param_dtype = jnp.dtype(param_dtype or dtype)
    path = locate(path_or_hub_id)
    config = config_of(path)
    if image_attention is not None:
        config = dataclasses.replace(config, image_attention=image_attention)
    graphdef, state = phivision.abstract(config, dtype=dtype, remat=remat, vision_remat=remat)
    if not isinstance(mesh, Mesh):
        devices = jax.local_devices()
        memory = devices[0].memory_stats() or {}  # None on CPUs
        default = (state, param_dtype.itemsize, len(devices), memory.get("bytes_limit"))
        sizes = dict(mesh or sharding.generation_sizes(*default))
        mesh = sharding.make_mesh(sizes, devices[: max(math.prod(sizes.values()), 0)])
    shardings = sharding.param_shardings(state, mesh)
    target = sharding.abstract(nnx.to_pure_dict(state), shardings, param_dtype)
    processor = processor_of(path, config)  # first: a damaged tokenizer is found before the weights are read
    return phivision.merge(graphdef, read_params(path, config, target)), processor


def locate(path_or_hub_id: str | Location) -> Location:
    """Find the directory with the weights: a Hugging Face one, or a checkpoint (of a run, its newest step).

    Raises:
      ValueError: when there is no such directory, or no checkpoint in it.
    """
    path = storage.location(path_or_hub_id)
    storage.check(path)
    if path.is_dir():
        with storage.wrap_storage_errors(path):
            return path if is_hf(path) else find_ours(path)
    name = str(path_or_hub_id)
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or path.exists() or path.parent.is_dir():
        known = "a checkpoint, a Hugging Face directory, or an id like org/name"
        raise ValueError(f"{name} is not a directory that has any files; give {known}")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        download = "to download it from the Hugging Face hub, pip install 'phivision_jax[hub]'"
        raise ValueError(f"{name} is not a directory; {download}") from None
    # Weights and text files only: remote code is never downloaded.
    patterns = ["*.safetensors", "*.json", "*.jinja", "*.txt"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # many types: no network, no such repository, no permission
        raise ValueError(f"{name} could not be downloaded from the Hugging Face hub: {error}") from error


def config_of(path: Location) -> ModelConfig:
    """The configuration of a located directory.

    Raises:
      ValueError: when it is damaged.
    """
    with storage.wrap_storage_errors(path):
        return model_config(path) if is_hf(path) else layout.model_of(path, layout.read_meta(path))


def processor_of(path: Location, config: ModelConfig) -> Processor:
    """The processor of a located directory.

    Raises:
      ValueError: when one of its files is damaged.
    """
    return Processor.from_directory(_verified_assets(path), config)


def _verified_assets(path: Location) -> Location:
    """Verify the files beside the weights of a located directory; return their directory."""
    if is_hf(path):
        return path
    layout.read_meta(path, assets=True)
    return path / layout.ASSETS


def copy_assets(path: Location, to: Path) -> None:
    """Copy the files beside the weights of a located directory, so that what starts from it can be exported again.

    Raises:
      ValueError: when one of these files is damaged or leads out of the directory; nothing is copied then.
    """
    source = _verified_assets(path)
    names = storage.files(source)
    to.mkdir(parents=True, exist_ok=True)
    for name in names:
        if is_asset(name):
            copy_file(source / name, to / name)


def read_params(path: Location, config: ModelConfig, target: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a located directory, in ``target``'s dtypes and shardings.

    The vision tail is read if ``target`` has it; adapters that ``target`` does not have are merged. All processes must
    call this.

    Raises:
      ValueError: as ``restore_params``, or ``read_hf_params``.
    """
    return read_hf_params(path, config, target) if is_hf(path) else restore_params(path, target)


def _nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    return nnx.traversals.unflatten_mapping({tuple(path.split("/")): leaf for path, leaf in leaves.items()})


# ---------------------------------------------------------------------------------------------------------------------
# From a checkpoint of ours.


def restore_params(checkpoint: Location, target: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that ``target`` names, in its dtypes and shardings; others are not read.

    Adapters that it does not name, of kernels that it names, are merged into these in fp32.

    Args:
      target: nested dict of ``jax.ShapeDtypeStruct`` with shardings.

    Raises:
      DamagedError: when an array or the metadata are not what was saved.
      ValueError: when an array is missing or has another shape, or the metadata lack what merging needs.
    """
    meta = layout.read_meta(checkpoint)
    saved, wanted = layout.arrays_of(meta), arrays.with_paths(target)
    for path, leaf in wanted.items():
        if (found := saved[path].shape if path in saved else None) != leaf.shape:
            raise ValueError(f"{checkpoint}: {path} is {found or 'missing'}, the model's {leaf.shape}")
    adapters = Adapters.find(checkpoint, meta, saved)
    merged = {path for path in adapters.kernels & wanted.keys() if adapter_paths(path)[0] not in wanted}
    # One at a time, and before the others: merging takes twice a kernel's size in fp32.
    params = {path: _merged(checkpoint, saved, path, wanted[path], adapters) for path in sorted(merged)}
    others = [path for path in wanted if path not in merged]
    ends = itertools.accumulate(_bytes_per_device(saved[path], wanted[path].sharding) for path in others)
    for _, batch in itertools.groupby(zip(ends, others, strict=True), lambda pair: pair[0] // _BATCH_BYTES):
        restored = _restore(checkpoint, saved, {path: wanted[path].sharding for _, path in batch})
        for path in list(restored):
            params[path] = restored.pop(path).astype(wanted[path].dtype)
    return _nested(params)


def _bytes_per_device(array: Array, placed: Any) -> int:
    """Bytes that an array with this sharding takes of each device, in its stored dtype."""
    return math.prod(placed.shard_shape(array.shape) if placed else array.shape) * jnp.dtype(array.dtype).itemsize


def _restore(checkpoint: Location, saved: Mapping[str, Array], shardings: Mapping[str, Any]) -> dict[str, jax.Array]:
    """These arrays as they were saved."""
    target = {}
    for path, placed in shardings.items():
        target[path] = jax.ShapeDtypeStruct(saved[path].shape, jnp.dtype(saved[path].dtype), sharding=placed)
    return arrays.with_paths(arrays.restore(checkpoint, PARAMS, _nested(target), saved))


def _merged(checkpoint: Location, saved: Mapping[str, Array], path: str, wanted: Any, adapters: Adapters) -> jax.Array:
    """A kernel with its adapter merged."""
    sharded, paths = wanted.sharding, (path, *adapter_paths(path))
    replicated = NamedSharding(sharded.mesh, PartitionSpec()) if isinstance(sharded, NamedSharding) else sharded
    restored = _restore(checkpoint, saved, dict(zip(paths, (sharded, replicated, replicated), strict=True)))

    def merge(kernel: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        leaves = {"kernel": kernel.astype(jnp.float32), lora.A: a, lora.B: b}
        return lora.merge(leaves, LoraConfig(adapters.rank, adapters.alpha))["kernel"].astype(wanted.dtype)

    return jax.jit(merge, out_shardings=sharded)(*(restored[path] for path in paths))


# ---------------------------------------------------------------------------------------------------------------------
# From a Hugging Face directory, without a checkpoint of ours in between.


def read_hf_params(directory: Location, config: ModelConfig, target: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that ``target`` names, in its dtypes and shardings.

    Besides the arrays on its own devices, the host holds one device's shard of one leaf and a few blocks at a time.
    Blocks of rows are read several at a time: in a bucket, each is a request that mostly waits.

    Args:
      directory: holds config.json and safetensors.
      config: the model that the tensors must fit.
      target: nested dict of ``jax.ShapeDtypeStruct`` with shardings.

    Raises:
      ValueError: when the directory does not hold exactly this model, naming the tensors.
    """
    wanted, leaves = arrays.with_paths(target), model_leaves(config)
    source, found = HFSource(HFDirectory(directory), leaves), {}
    with ThreadPoolExecutor(WORKERS) as pool:
        for leaf in leaves:
            if (want := wanted.get(leaf.path)) is not None:
                read = functools.partial(_read_region, source, leaf, want.dtype, pool)
                found[leaf.path] = jax.make_array_from_callback(leaf.shape, want.sharding, read)
    return _nested(found)


def _read_region(source: HFSource, leaf: Leaf, dtype: np.dtype, pool: ThreadPoolExecutor, index: Any) -> np.ndarray:
    """``leaf[index]``: reads only the rows of Hugging Face tensors in it, and casts block by block."""
    spans = [range(size)[span] for size, span in zip(leaf.shape, index or (), strict=True)]
    layers = spans.pop(0) if leaf.stacked else range(1)
    axis, per = leaf.row_axis, leaf.rows_per_index
    rows = range(spans[axis].start * per, spans[axis].stop * per)
    rest = tuple(slice(None) if i == axis else slice(s.start, s.stop) for i, s in enumerate(spans))
    out = np.empty((len(layers), *(len(span) for span in spans)), dtype)

    def fill(place: tuple[int, int]) -> None:
        i, start = place
        piece = range(start, min(start + step, rows.stop))
        (block,) = source.read(leaf, range(layers[i], layers[i] + 1), piece)
        along = slice((piece.start - rows.start) // per, (piece.stop - rows.start) // per)
        out[i][(slice(None),) * axis + (along,)] = leaf.to_ours(block)[rest]

    step = block_rows(leaf, source.dtype(leaf).itemsize)
    list(pool.map(fill, itertools.product(range(len(layers)), rows[::step])))
    return out if leaf.stacked else out[0]
