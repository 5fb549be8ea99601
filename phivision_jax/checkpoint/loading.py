"""Load a model and its processor from a Hugging Face directory, a conversion or a training run.

Adapters (LoRA) of a training run are merged as they are read: a loaded model has no adapters and answers as fast as any
other, and a run that starts from such a checkpoint begins with the merged weights, with or without adapters of its own.

Weights are streamed: a block of rows is read, cast or quantised, and copied into the arrays of one leaf, the only ones
that the host holds besides those on its devices. The largest leaves come first, so where devices use the host's memory,
these copies never add to the complete model.

Everything that is read of a checkpoint is verified (``layout.py``); the optimizer state is neither read nor verified.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from phivision_jax import sharding
from phivision_jax.checkpoint import arrays, layout
from phivision_jax.checkpoint.layout import DamagedError
from phivision_jax.config import ImageAttention, ModelConfig
from phivision_jax.convert.hf import HFDirectory, HFSource, find_ours, is_asset
from phivision_jax.convert.hf_config import is_hf, model_config
from phivision_jax.convert.jobs import copy_file
from phivision_jax.convert.mapping import Leaf, model_leaves
from phivision_jax.convert.ours import OursSource
from phivision_jax.convert.stream import WORKERS, Source, in_parallel
from phivision_jax.distributed.processes import first_error
from phivision_jax.io import storage
from phivision_jax.io.messages import first_line
from phivision_jax.io.storage import Location
from phivision_jax.models import int8, phivision
from phivision_jax.models.phivision import PhiVision
from phivision_jax.processor import Processor

_PIECE = 1 << 18
"""Numbers that are quantised at a time: they and their copies in fp32 stay in the processor's cache."""


def load(
    path_or_hub_id: str | Location,
    *,
    dtype: Any = None,
    param_dtype: Any = None,
    weights: str | None = None,
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
      weights: "int8" for the matrices in int8 with a scale per output channel, half the memory of bfloat16: for
        inference, not for training; default: in ``param_dtype``.
      mesh: to shard the parameters over, or the sizes of its axes, as {"fsdp": 4, "tensor": 2}, on the first devices of
        this process; default: all of these, with as few shards of the weights as leave room for a cache
        (``sharding.generation_sizes``). ``generate`` uses the mesh that the parameters are on; other calls of a model
        on several devices need ``with jax.set_mesh(sharding.mesh_of(params)):``.
      remat: as in ``PhiVision``, for both towers.
      image_attention: "causal" or "bidirectional"; default: as in the checkpoint (a Hugging Face one is causal).

    Returns:
      The model and its processor, which has no tokenizer if the checkpoint has none.

    Raises:
      ValueError: when there is nothing to load, or it is damaged (the message names the file or array), or for an
        argument that does not exist.
      StorageError: when a bucket cannot be read; the message suggests a remedy.
    """
    dtype = jnp.dtype(dtype or (jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16))
    param_dtype = jnp.dtype(param_dtype or dtype)
    path = locate(path_or_hub_id)
    config = config_of(path)
    if image_attention is not None:
        config = dataclasses.replace(config, image_attention=image_attention)
    graphdef, state = phivision.abstract(config, dtype=dtype, remat=remat, vision_remat=remat, weights=weights)
    if not isinstance(mesh, Mesh):
        devices = jax.local_devices()
        memory = devices[0].memory_stats() or {}  # None on CPUs
        default = (state, param_dtype.itemsize, len(devices), memory.get("bytes_limit"))
        sizes = dict(mesh or sharding.generation_sizes(*default))
        mesh = sharding.make_mesh(sizes, devices[: max(math.prod(sizes.values()), 0)])
    with sharding.generation_rules(config, mesh):
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
        problem = f"{name} is not a directory here, and could not be downloaded from the Hugging Face hub"
        raise ValueError(f"{problem}: {first_line(error)}") from error


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
    """The parameters of a located directory, in ``target``'s dtypes and shardings; others are not read.

    Adapters are merged. Matrices that are int8 in ``target`` are quantised (``models/int8.py``). All processes must
    call this. Each reads the rows that its devices need, and of a checkpoint also all of its share of the arrays, to
    verify them.

    Args:
      config: the model that the arrays must fit.
      target: nested dict of ``jax.ShapeDtypeStruct`` with shardings.

    Raises:
      DamagedError: in all processes, when an array of a checkpoint or its metadata are not what was saved.
      ValueError: when the directory does not hold this model, naming the arrays.
    """
    wanted, params, problem = arrays.with_paths(target), dict[str, jax.Array](), None
    leaves = sorted(model_leaves(config), key=lambda leaf: -math.prod(leaf.shape))
    try:
        if is_hf(path):
            source: Source = HFSource(HFDirectory(path), leaves)
        else:
            read = [leaf for leaf in leaves if leaf.path in wanted]
            source = OursSource(path, layout.read_meta(path), read, exact=False)
        with ThreadPoolExecutor(WORKERS) as pool:
            for number, leaf in enumerate(leaf for leaf in source.leaves if leaf.path in wanted):
                verified_here = isinstance(source, OursSource) and number % jax.process_count() == jax.process_index()
                params |= _read_leaf(pool, source, leaf, wanted, everything=verified_here)
    except DamagedError as error:
        problem = error.problem
    if problem := first_error(problem):
        raise DamagedError(path, problem)
    return nnx.traversals.unflatten_mapping({tuple(path.split("/")): leaf for path, leaf in params.items()})


def _read_leaf(
    pool: ThreadPoolExecutor, source: Source, leaf: Leaf, wanted: Mapping[str, Any], *, everything: bool
) -> dict[str, jax.Array]:
    """A leaf, and its scales if they are wanted, by path.

    Args:
      everything: also read what no device of this process needs.
    """
    kernel, scale = _Shards(leaf, wanted[leaf.path]), None
    scale_path = f"{leaf.path.rpartition('/')[0]}/{int8.SCALE}"
    if kernel.dtype == np.int8:
        outputs = " ".join(leaf.their_axes[0])
        per_row = dataclasses.replace(leaf, path=scale_path, axes=f"({outputs}) -> {outputs}")
        scale = _Shards(per_row, wanted[scale_path])

    def read(leaf: Leaf, layers: range, rows: range) -> None:
        if not (everything or kernel.need(layers, rows)):
            return
        for layer, block in zip(layers, source.read(leaf, layers, rows), strict=True):
            if scale:
                block, per_row = _quantise_rows(block)
                scale.fill(layer, rows, per_row)
            kernel.fill(layer, rows, block)

    for _ in in_parallel(pool, read, [leaf], lambda leaf: (4, source.grain(leaf))):
        pass
    return {shards.leaf.path: shards.array() for shards in (kernel, scale) if shards}


def _quantise_rows(block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows in int8, and the scale of each: what one output sums over is a row of Hugging Face's."""
    pieces = np.array_split(block, 1 + block.size // _PIECE)
    summed = tuple(range(1, block.ndim))
    quantised, scales = zip(*(int8.quantise(piece, summed, np) for piece in pieces), strict=True)
    return np.concatenate(quantised), np.concatenate(scales)


class _Shards:
    """The different shards of a leaf on this process's devices, filled from runs of Hugging Face rows."""

    def __init__(self, leaf: Leaf, want: jax.ShapeDtypeStruct) -> None:
        self.leaf, self.dtype, self._placed = leaf, np.dtype(want.dtype), want.sharding
        self._shards: dict[tuple[range, ...], np.ndarray] = {}
        for index in want.sharding.addressable_devices_indices_map(leaf.shape).values():
            spans = self._spans(index)
            if spans not in self._shards:
                self._shards[spans] = np.empty([len(span) for span in spans], self.dtype)

    def _spans(self, index: Sequence[slice] | None) -> tuple[range, ...]:
        return tuple(range(size)[span] for size, span in zip(self.leaf.shape, index or (), strict=True))

    def _overlaps(self, layers: range, rows: range) -> Iterator[tuple[np.ndarray, range, tuple[range, ...]]]:
        """Each shard of a layer with some of these rows, the part of them along ``row_axis``, and the shard's place."""
        axis, per = self.leaf.row_axis, self.leaf.rows_per_index
        for spans, shard in self._shards.items():
            for layer in layers:
                held = spans[0] if self.leaf.stacked else range(1)
                inside = spans[1:] if self.leaf.stacked else spans
                part = range(max(rows.start // per, inside[axis].start), min(rows.stop // per, inside[axis].stop))
                if layer in held and part:
                    yield (shard[layer - held.start] if self.leaf.stacked else shard), part, inside

    def need(self, layers: range, rows: range) -> bool:
        """True if a shard holds any of these rows."""
        return any(True for _ in self._overlaps(layers, rows))

    def fill(self, layer: int, rows: range, block: np.ndarray) -> None:
        """Copy rows of one layer to the shards that hold them, cast to their dtype."""
        axis, ours = self.leaf.row_axis, self.leaf.to_ours(block)
        first = rows.start // self.leaf.rows_per_index
        for shard, part, inside in self._overlaps(range(layer, layer + 1), rows):
            source = [slice(span.start, span.stop) for span in inside]
            source[axis] = slice(part.start - first, part.stop - first)
            within = slice(part.start - inside[axis].start, part.stop - inside[axis].start)
            shard[(slice(None),) * axis + (within,)] = ours[tuple(source)]

    def array(self) -> jax.Array:
        """The leaf on the devices; this object is not used again."""
        shape, shards, self._shards = self.leaf.shape, self._shards, {}
        return jax.make_array_from_callback(shape, self._placed, lambda index: shards[self._spans(index)], self.dtype)
