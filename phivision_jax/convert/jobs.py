"""The two conversions: plan, report the plan, open a new directory, stream the tensors.

Everything that headers and metadata can show is checked before the destination is touched.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from rich.filesize import decimal

from phivision_jax.checkpoint.layout import ASSETS, ORBAX_MARK, check_assets, find, model_of, read_meta
from phivision_jax.config import ModelConfig
from phivision_jax.convert import ours
from phivision_jax.convert.hf import INDEX, HFDirectory, HFSink, HFSource, plan_shards
from phivision_jax.convert.hf_config import EXPRESSIBLE, config_json, decoder_config, model_config, vision_config
from phivision_jax.convert.mapping import (
    SIGLIP2_PREFIX,
    SIGLIP2_UNUSED,
    Leaf,
    Shape,
    check,
    decoder_leaves,
    hf_shapes,
    model_leaves,
    projector_leaves,
    vision_leaves,
)
from phivision_jax.convert.output import new_checkpoint, require_space, resolved
from phivision_jax.convert.stream import FreshProjector, Source, copy
from phivision_jax.io import storage
from phivision_jax.io.progress import bar
from phivision_jax.io.storage import Location, read_json

type Part = tuple[Source, list[Leaf]]
"""Leaves, and the source to read them from."""
type Files = dict[str, Location | bytes]
"""Other files to write: relative name → the file to copy, or the contents."""
type Tensors = Mapping[str, tuple[np.dtype, Shape]]

CASTS = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def log(line: str) -> None:
    print(line, file=sys.stderr)


def dtypes_of(parts: Iterable[Part], dtype: str) -> dict[str, np.dtype]:
    """The dtype to store each leaf in: its own ("keep"), or one for all."""
    return {leaf.path: CASTS.get(dtype) or source.dtype(leaf) for source, leaves in parts for leaf in leaves}


def count_bytes(leaves: Iterable[Leaf], dtypes: Mapping[str, np.dtype]) -> int:
    return sum(math.prod(leaf.shape) * dtypes[leaf.path].itemsize for leaf in leaves)


def tensors_of(leaves: list[Leaf], dtypes: Mapping[str, np.dtype]) -> Tensors:
    """The Hugging Face tensors of these leaves.

    Raises:
      ValueError: when the parts of a fused tensor have different dtypes.
    """
    found: dict[str, np.dtype] = {}
    for leaf in leaves:
        for name in leaf.names:
            if found.setdefault(name, dtypes[leaf.path]) != dtypes[leaf.path]:
                raise ValueError(f"{leaf.path} is {dtypes[leaf.path]}, the rest of {name} {found[name]}; pass --dtype")
    return {name: (found[name], shape) for name, shape in hf_shapes(leaves).items()}


@contextmanager
def _writing(
    verb: str,
    sources: Sequence[Location],
    out: Location,
    overwrite: bool,
    leaves: list[Leaf],
    dtypes: Mapping[str, np.dtype],
    num_files: int,
) -> Iterator[tuple[Path, Callable[[int], None]]]:
    """Report the plan and refuse what cannot fit; yield the new directory, and a function that takes written bytes."""
    total, shapes = count_bytes(leaves, dtypes), hf_shapes(leaves)
    kinds = ", ".join(sorted({dtype.name for dtype in dtypes.values()}))
    log(f"{verb}: {' + '.join(map(str, sources))} -> {out}")
    numbers = sum(math.prod(shape) for shape in shapes.values())
    log(f"  {len(shapes)} tensors, {numbers:,} parameters, {decimal(total)} as {kinds}; {num_files} other files")
    require_space(total + total // 100, out)
    with new_checkpoint(out, overwrite, sources, log) as directory:
        start = time.perf_counter()
        with bar(verb, total, in_bytes=True, shown=sys.stderr.isatty()) as advance:
            yield directory, advance
        seconds = time.perf_counter() - start
        log(f"{verb}: {decimal(total)} in {seconds:.1f} s, {decimal(int(total / seconds))}/s")
    log(f"wrote {out}")


def _write_files(files: Files, directory: Path) -> None:
    for name, content in files.items():
        target = directory / name
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
    hf, config = HFDirectory(hf_dir), model_config(hf_dir)
    leaves = model_leaves(config)
    origin = {"kind": "huggingface", "directory": resolved(hf_dir).name}
    _write_ours([(HFSource(hf, leaves), leaves)], config, [hf_dir], out, dtype, overwrite, origin, _assets(hf))


def compose(decoder_dir: Location, vision_dir: Location, out: Location, dtype: str, overwrite: bool, seed: int) -> None:
    """Compose a checkpoint to train from: a text-only Phi-4, a SigLIP-2, and a fresh projector."""
    text, siglip = HFDirectory(decoder_dir), HFDirectory(vision_dir)
    vision_json = read_json(vision_dir / "config.json")
    config = ModelConfig(
        decoder=decoder_config(read_json(decoder_dir / "config.json")),
        vision=vision_config(vision_json.get("vision_config", vision_json)),
    )
    decoder, vision = decoder_leaves(config.decoder), vision_leaves(config.vision, SIGLIP2_PREFIX)
    decoder_source = HFSource(text, decoder)
    fresh = FreshProjector(CASTS.get(dtype) or decoder_source.dtype(decoder[0]), seed)
    parts: list[Part] = [
        (decoder_source, decoder),
        (HFSource(siglip, vision, SIGLIP2_UNUSED), vision),
        (fresh, projector_leaves(config)),
    ]
    assets = _assets(text)
    # The decoder's own config.json describes another model.
    assets["config.json"] = json_bytes(config_json(config))
    assets |= _with_think_tokens(assets)
    if unused := [name for name in siglip.entries if name.startswith(SIGLIP2_UNUSED)]:
        log(f"ignoring {len(unused)} tensors of {vision_dir} that this model lacks ({', '.join(SIGLIP2_UNUSED)})")
    log(f"projector: LeCun-normal kernels, zero biases, seed {seed}")
    names = {"decoder": resolved(decoder_dir).name, "vision": resolved(vision_dir).name}
    origin = {"kind": "composed", **names, "projector_seed": seed}
    _write_ours(parts, config, [decoder_dir, vision_dir], out, dtype, overwrite, origin, assets)


def _with_think_tokens(assets: Files) -> Files:
    """The tokenizer's files with ``<think>`` and ``</think>`` in the two places that Phi-4-reasoning gave them.

    A plain Phi-4 has unused tokens with the same ids there.
    """
    renamed: Files = {}
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        content = assets.get(name, b"")
        text = content if isinstance(content, bytes) else content.read_bytes()
        if b"<think>" not in text and b"<|dummy_87|>" in text:
            renamed[name] = text.replace(b"<|dummy_86|>", b"<think>").replace(b"<|dummy_87|>", b"</think>")
    if renamed:
        log("tokenizer: <|dummy_86|> and <|dummy_87|> become <think> and </think>, as in Phi-4-reasoning")
    return renamed


def _write_ours(
    parts: list[Part],
    config: ModelConfig,
    sources: list[Location],
    out: Location,
    dtype: str,
    overwrite: bool,
    origin: Mapping[str, Any],
    assets: Files,
) -> None:
    dtypes = dtypes_of(parts, dtype)
    leaves = [leaf for _, part in parts for leaf in part]
    with _writing("to-jax", sources, out, overwrite, leaves, dtypes, len(assets)) as (directory, advance):
        sink = ours.OursSink(directory, dtypes, leaves)
        for source, part in parts:
            copy(source, sink, part, dtypes, advance)
        _write_files(assets, directory / ASSETS)
        sink.finish(config, {"step": 0, "source": origin})


def _assets(hf: HFDirectory) -> Files:
    """The files of a Hugging Face directory beside its tensors, except weights that no index names."""
    return {name: hf.directory / name for name in hf.sidecars() if not name.endswith(".safetensors")}


def json_bytes(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


# ---------------------------------------------------------------------------------------------------------------------
# Ours → Hugging Face.


def open_ours(path: Location, *, assets: bool = False) -> tuple[Location, ModelConfig, list[Leaf], ours.OursSource]:
    """Open a checkpoint of ours, or the newest step of a run.

    Args:
      assets: also verify the files beside the weights. Arrays are verified as they are read.

    Returns:
      The checkpoint's place, its configuration, the leaves of its table, and their source.

    Raises:
      DamagedError: when the metadata, or one of these files, is not what was saved.
      ValueError: when there is no checkpoint of ours.
    """
    found = find(path)
    if found != path:
        log(f"{path} is a training run; taking the newest step, {found.name}")
    meta = read_meta(found)
    if assets:
        check_assets(found, meta)
    config = model_of(meta)
    leaves = model_leaves(config)
    source = ours.OursSource(found, meta, leaves)
    if source.adapters.kernels:
        log(f"{found} has {source.adapters}; they are merged as they are read")
    return found, config, leaves, source


def to_hf(
    checkpoint: Location,
    out: Location,
    like: Location | None,
    dtype: str,
    shard_bytes: int,
    overwrite: bool,
    force: bool,
) -> None:
    """Convert a checkpoint of ours to a Hugging Face directory.

    Args:
      like: a Hugging Face directory whose shards, headers, index and other files to reproduce.
      force: write a model that ``config.json`` cannot express, without saying so in it.
    """
    found, config, leaves, source = open_ours(checkpoint, assets=like is None)
    if force:
        config = dataclasses.replace(config, **EXPRESSIBLE)
    config_json(config)  # raises for what it cannot express
    dtypes = dtypes_of([(source, leaves)], dtype)
    tensors = tensors_of(leaves, dtypes)
    if like is None:
        headers, files = _new_layout(config, tensors, found / ASSETS, shard_bytes)
    else:
        headers, files = _layout_like(HFDirectory(like), config, tensors)
    sources = [found] if like is None else [found, like]
    with _writing("to-hf", sources, out, overwrite, leaves, dtypes, len(files)) as (directory, advance):
        copy(source, HFSink(directory, headers), leaves, dtypes, advance)
        _write_files(files, directory)


def _new_layout(
    config: ModelConfig, tensors: Tensors, assets: Location, shard_bytes: int
) -> tuple[dict[str, bytes], Files]:
    """Headers of new shards; the assets, with an index and a ``config.json`` that fits."""
    headers, index = plan_shards(tensors, shard_bytes)
    files: Files = {name: assets / name for name in storage.files(assets) if not name.endswith(ORBAX_MARK)}
    if index is not None:
        files[INDEX] = index
    base = read_json(assets / "config.json") if "config.json" in files else None
    values = config_json(config, base)
    kinds = {dtype.name for dtype, _ in tensors.values()}
    if len(kinds) == 1:  # mixed dtypes are stated by the tensors alone
        values["torch_dtype" if "torch_dtype" in values else "dtype"] = kinds.pop()
    if values != base:
        files["config.json"] = json_bytes(values)
    return headers, files


def _layout_like(hf: HFDirectory, config: ModelConfig, tensors: Tensors) -> tuple[dict[str, bytes], Files]:
    """The headers, the index and the other files of ``hf``."""
    where = f"--like {hf.directory}"
    shapes = {name: entry.shape for name, entry in hf.entries.items()}
    check(shapes, {name: shape for name, (_, shape) in tensors.items()}, where)
    for name, entry in hf.entries.items():
        if entry.dtype != tensors[name][0]:
            raise ValueError(
                f"{where} has {name} as {entry.dtype}, this checkpoint as {tensors[name][0]}; pass --dtype"
            )
    if model_config(hf.directory) != config:
        raise ValueError(f"{where}: its config.json describes another model than this checkpoint's")
    names = [*hf.sidecars(), INDEX] if INDEX in hf.files else hf.sidecars()
    return hf.headers, {name: hf.directory / name for name in names}
