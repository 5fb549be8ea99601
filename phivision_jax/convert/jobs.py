"""The two conversions: plan, report the plan, open a new directory, stream the tensors.

Everything that headers and metadata can show is checked before the destination is touched.
"""

import dataclasses
import functools
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from rich.filesize import decimal

from phivision_jax.checkpoint import layout
from phivision_jax.config import FIXED, ModelConfig, ProjectorConfig
from phivision_jax.convert import adapters, hf_config, mapping, ours, output, stream
from phivision_jax.convert.hf import INDEX, HFDirectory, HFSink, HFSource, find_ours, is_asset, plan_shards
from phivision_jax.io import storage
from phivision_jax.io.messages import printable, shorten
from phivision_jax.io.progress import bar
from phivision_jax.io.read_json import LARGEST_FILE, read_json
from phivision_jax.io.storage import Location

type Dtypes = Mapping[mapping.Leaf, np.dtype]
"""Leaves, and the dtype to store each in."""
type Files = dict[str, Location | bytes]
"""Other files to write: relative name → the file to copy, or the contents."""
type Headers = dict[str, bytes]
"""Headers of new shards by file name."""
type OpenSink = Callable[[Path], stream.Sink]
"""Opens a sink in an empty directory."""
type Place = tuple[Sequence[Location], Location, bool]
"""The inputs of a conversion, its output, and whether that may be replaced."""
type Tensors = Mapping[str, tuple[np.dtype, mapping.Shape]]

CASTS = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def log(line: str) -> None:
    print(printable(line), file=sys.stderr)


def dtypes_of(sources: Iterable[stream.Source], dtype: str) -> Dtypes:
    """The leaves of these sources with their own dtypes ("keep"), or one for all."""
    return {leaf: CASTS.get(dtype) or source.dtype(leaf) for source in sources for leaf in source.leaves}


def count_bytes(dtypes: Dtypes) -> int:
    return sum(math.prod(leaf.shape) * dtype.itemsize for leaf, dtype in dtypes.items())


def tensors_of(dtypes: Dtypes) -> Tensors:
    """The Hugging Face tensors of these leaves.

    Raises:
      ValueError: when the parts of a fused tensor have different dtypes.
    """
    found: dict[str, np.dtype] = {}
    for leaf, dtype in dtypes.items():
        for name in leaf.names:
            if found.setdefault(name, dtype) != dtype:
                raise ValueError(f"{leaf.path} is {dtype}, the rest of {name} {found[name]}; pass --dtype")
    return {name: (found[name], shape) for name, shape in mapping.hf_shapes(dtypes).items()}


def _convert(
    verb: str, sources: Sequence[stream.Source], dtypes: Dtypes, place: Place, files: Files, open_sink: OpenSink
) -> None:
    """Report the plan and refuse what cannot fit; write the leaves and ``files`` to a new directory."""
    inputs, out, overwrite = place
    total, shapes = count_bytes(dtypes), mapping.hf_shapes(dtypes)
    kinds = ", ".join(sorted({dtype.name for dtype in dtypes.values()}))
    log(f"{verb}: {' + '.join(map(str, inputs))} -> {out}")
    numbers = sum(math.prod(shape) for shape in shapes.values())
    log(f"  {len(shapes)} tensors, {numbers:,} parameters, {decimal(total)} as {kinds}; {len(files)} other files")
    output.require_space(total + total // 100, out)
    with output.new_checkpoint(out, overwrite, inputs, log) as directory:
        start, sink = time.perf_counter(), open_sink(directory)
        with bar(verb, total, in_bytes=True, shown=sys.stderr.isatty()) as advance:
            for source in sources:
                stream.copy(source, sink, dtypes, advance)
            for name, content in files.items():
                copy_file(content, directory / sink.folder / name)
            sink.finish()
        seconds = time.perf_counter() - start
        log(f"{verb}: {decimal(total)} in {seconds:.1f} s, {decimal(int(total / seconds))}/s")
    log(f"wrote {out}")


def copy_file(content: Location | bytes, target: Path) -> None:
    """Write a file that another one, or ``content`` itself, gives the content of."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        target.write_bytes(content)
    elif isinstance(content, Path):
        shutil.copyfile(content, target)
    else:
        storage.download(content.parent, target.parent, [content.name])


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face → ours.


def to_jax(hf_dir: Location, out: Location, dtype: str, overwrite: bool) -> None:
    """Convert a Hugging Face directory to a checkpoint of ours."""
    hf, config = HFDirectory(hf_dir), hf_config.model_config(hf_dir)
    sources = [HFSource(hf, mapping.model_leaves(config))]
    dtypes = dtypes_of(sources, dtype)
    if hf.buffers:
        log(f"ignoring {len(hf.buffers)} buffers of {hf_dir} that are computed here ({shorten(hf.buffers[0])}, …)")
    meta = _meta(config, {"kind": "huggingface", "directory": output.resolved(hf_dir).name})
    open_sink = functools.partial(ours.OursSink, dtypes, meta)
    _convert("to-jax", sources, dtypes, ([hf_dir], out, overwrite), _assets(hf), open_sink)


def compose(
    decoder_dir: Location,
    vision_dir: Location,
    out: Location,
    dtype: str,
    overwrite: bool,
    seed: int,
    tiles: tuple[str, int],
) -> None:
    """Compose a checkpoint to train from: a text-only Phi-4, a SigLIP-2, and a fresh projector.

    Args:
      tiles: the image layout, and how many features a vision token joins.
    """
    text, siglip = HFDirectory(decoder_dir), HFDirectory(vision_dir)
    phi4, siglip2 = map(hf_config.read_config, (decoder_dir, vision_dir))
    encoder = hf_config.vision_config(*siglip2)
    config = ModelConfig(
        vision=encoder,
        decoder=hf_config.decoder_config(*phi4),
        image_layout=tiles[0],
        projector=ProjectorConfig(tiles[1]),
        tile_size=encoder.tile_pixels if encoder.encoder == FIXED else ModelConfig.tile_size,
    )
    decoder = HFSource(text, mapping.decoder_leaves(config.decoder))
    vision = HFSource(siglip, mapping.vision_leaves(config.vision, mapping.SIGLIP2_PREFIX), mapping.SIGLIP2_UNUSED)
    projector_dtype = CASTS.get(dtype) or decoder.dtype(decoder.leaves[0])
    projector = stream.FreshProjector(mapping.projector_leaves(config), projector_dtype, seed)
    sources: list[stream.Source] = [decoder, vision, projector]
    dtypes = dtypes_of(sources, dtype)
    # The decoder's own config.json describes another model.
    assets = _assets(text) | {"config.json": json_bytes(hf_config.config_json(config))}
    assets |= _with_think_tokens(assets)
    if unused := [name for name in siglip.entries if name.startswith(mapping.SIGLIP2_UNUSED)]:
        kinds = ", ".join(mapping.SIGLIP2_UNUSED)
        log(f"ignoring {len(unused)} tensors of {vision_dir} that this model lacks ({kinds})")
    log(f"projector: LeCun-normal kernels, zero biases, seed {seed}")
    names = {"decoder": output.resolved(decoder_dir).name, "vision": output.resolved(vision_dir).name}
    meta = _meta(config, {"kind": "composed", **names, "projector_seed": seed})
    open_sink = functools.partial(ours.OursSink, dtypes, meta)
    _convert("to-jax", sources, dtypes, ([decoder_dir, vision_dir], out, overwrite), assets, open_sink)


def _with_think_tokens(assets: Files) -> Files:
    """The tokenizer's files with ``<think>`` and ``</think>`` in the two places that Phi-4-reasoning gave them.

    A plain Phi-4 has unused tokens with the same ids there.
    """
    renamed: Files = {}
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        content = assets.get(name, b"")
        text = content if isinstance(content, bytes) else storage.read_range(content, 0, LARGEST_FILE)
        if b"<think>" not in text and b"<|dummy_87|>" in text:
            renamed[name] = text.replace(b"<|dummy_86|>", b"<think>").replace(b"<|dummy_87|>", b"</think>")
    if renamed:
        log("tokenizer: <|dummy_86|> and <|dummy_87|> become <think> and </think>, as in Phi-4-reasoning")
    return renamed


def _assets(hf: HFDirectory) -> Files:
    """The files of a Hugging Face directory beside its tensors, except weights that no index names."""
    return {name: hf.directory / name for name in hf.others if is_asset(name)}


def _meta(config: ModelConfig, origin: Mapping[str, Any]) -> dict[str, Any]:
    return {"model": dataclasses.asdict(config), "step": 0, "source": origin}


def json_bytes(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


# ---------------------------------------------------------------------------------------------------------------------
# Ours → Hugging Face.


def open_ours(path: Location, *, assets: bool = False) -> tuple[Location, ModelConfig, ours.OursSource]:
    """Open a checkpoint of ours, or the newest step of a run.

    Args:
      assets: also verify the files beside the weights. Arrays are verified as they are read.

    Returns:
      The checkpoint's place, its configuration, and the source of its weights.

    Raises:
      DamagedError: when the metadata, or one of these files, is not what was saved.
      ValueError: when there is no checkpoint of ours.
    """
    found = find_ours(path)
    if found != path:
        log(f"{path} is a training run; taking the newest step, {found.name}")
    meta = layout.read_meta(found, assets=assets)
    config = layout.model_of(found, meta)
    source = ours.OursSource(found, meta, mapping.model_leaves(config))
    if source.adapters.kernels:
        log(f"{found} has {source.adapters}; they are merged when weights are read")
    return found, config, source


def to_hf(
    checkpoint: Location, out: Location, like: Location | None, dtype: str, max_bytes: int, overwrite: bool, force: bool
) -> None:
    """Convert a checkpoint of ours to a Hugging Face directory.

    Args:
      like: a Hugging Face directory whose shards, headers, index and other files to reproduce.
      force: write a model that ``config.json`` cannot express, without saying so in it.
    """
    found, config, source = open_ours(checkpoint, assets=like is None)
    if force:
        config = dataclasses.replace(config, **hf_config.expressible(config.vision))
    hf_config.config_json(config)  # raises for what it cannot express
    dtypes = dtypes_of([source], dtype)
    tensors = tensors_of(dtypes)
    if like is None:
        headers, files = _new_layout(config, tensors, found / layout.ASSETS, max_bytes)
        if source.meta.get("run"):
            files["README.md"] = adapters.model_card(output.resolved(out).name, source.meta)
        if not any(name.endswith(".py") for name in files):
            log("transformers cannot load it without remote code: --like RELEASED_DIR adds the released model's")
    else:
        headers, files = _layout_like(HFDirectory(like), config, tensors, dtype in CASTS)
    place = ([found] if like is None else [found, like], out, overwrite)
    _convert("to-hf", [source], dtypes, place, files, functools.partial(HFSink, headers))


def to_peft(checkpoint: Location, out: Location, overwrite: bool) -> None:
    """Write the adapters of a run's checkpoint, as PEFT reads them."""
    found, _, source = open_ours(checkpoint)
    if not source.adapters.kernels:
        raise ValueError(f"{found} has no adapters: it was not trained with lora.rank")
    files = adapters.peft_files(source) | {"README.md": adapters.model_card(output.resolved(out).name, source.meta)}
    with output.new_checkpoint(out, overwrite, [found], log) as directory:
        for name, content in files.items():
            copy_file(content, directory / name)
    log(f"wrote {source.adapters} to {out}")


def _new_layout(config: ModelConfig, tensors: Tensors, assets: Location, max_bytes: int) -> tuple[Headers, Files]:
    """Headers of new shards; the assets, with an index and a ``config.json`` that fits."""
    headers, index = plan_shards(tensors, max_bytes)
    files: Files = {name: assets / name for name in storage.files(assets) if not name.endswith(layout.ORBAX_MARK)}
    if index is not None:
        files[INDEX] = index
    base = read_json(assets / "config.json") if "config.json" in files else None
    values = hf_config.config_json(config, base)
    kinds = {dtype.name for dtype, _ in tensors.values()}
    if len(kinds) == 1:  # mixed dtypes are stated by the tensors alone
        values["torch_dtype" if "torch_dtype" in values else "dtype"] = kinds.pop()
    if values != base:
        files["config.json"] = json_bytes(values)
    if base is None or not {*config.decoder.stop_ids} <= {*hf_config.model_config(assets).decoder.stop_ids}:
        files[hf_config.GENERATION] = json_bytes(hf_config.generation_json(config))
    return headers, files


def _layout_like(hf: HFDirectory, config: ModelConfig, tensors: Tensors, cast: bool) -> tuple[Headers, Files]:
    """The headers, the index and the other files of ``hf``."""
    where = f"--like {hf.directory}"
    if hf.buffers:
        problem = f"holds buffers that a checkpoint lacks ({shorten(hf.buffers[0])}, …)"
        raise ValueError(f"{where} {problem}; convert without --like")
    shapes = {name: entry.shape for name, entry in hf.entries.items()}
    mapping.check(shapes, {name: shape for name, (_, shape) in tensors.items()}, where)
    for name, entry in hf.entries.items():
        if entry.dtype != (dtype := tensors[name][0]):
            problem = f"--dtype {dtype} contradicts it" if cast else f"not {dtype} as here; pass --dtype {entry.dtype}"
            raise ValueError(f"{where} has {name} as {entry.dtype}, {problem}")
    if hf_config.model_config(hf.directory) != config:
        raise ValueError(f"{where}: its config.json describes another model than this checkpoint's")
    return hf.headers, {name: hf.directory / name for name in hf.others}
