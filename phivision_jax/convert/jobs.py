"""The two conversions as functions: plan, say the plan, stage a directory, stream, finish. `cli` is their front.

Every check that can be made from headers is made before the destination is touched.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import ml_dtypes
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from phivision_jax.checkpoint import manifest
from phivision_jax.checkpoint.layout import ASSETS, META, ORBAX_MARK, PARAMS, find, read_meta
from phivision_jax.config import ModelConfig, ProjectorConfig
from phivision_jax.convert import ours
from phivision_jax.convert.hf import INDEX, HFDirectory, HFSink, HFSource, plan_shards
from phivision_jax.convert.hf_config import config_json, decoder_config, model_config, vision_config
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
from phivision_jax.convert.output import copy_file, human, require_space, resolved, staged, uploaded
from phivision_jax.convert.stream import FreshProjector, Parts, Source, copy
from phivision_jax.io import storage
from phivision_jax.io.storage import Location, read_json

console = Console(stderr=True, highlight=False, soft_wrap=True)
type Files = dict[PurePosixPath, Location | bytes]
"""Other files to write: name → where to copy from, or the bytes."""
type Tensors = Mapping[str, tuple[np.dtype, Shape]]

CASTS = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def say(line: str) -> None:
    console.print(line, markup=False)


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr while the block runs, and a line with time and rate after it."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    start = time.perf_counter()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=total)
        yield lambda done: bar.advance(task, done)
    seconds = time.perf_counter() - start
    say(f"{label}: {human(total)} in {seconds:.1f} s, {total / seconds / 1e6:.0f} MB/s")


def dtypes_of(source: Source, leaves: list[Leaf], dtype: str) -> dict[str, np.dtype]:
    """What each leaf will be stored as: as it is ("keep"), or all as one."""
    return {leaf.path: CASTS[dtype] if dtype != "keep" else source.dtype(leaf) for leaf in leaves}


def count_bytes(leaves: list[Leaf], dtypes: Mapping[str, np.dtype]) -> int:
    return sum(int(np.prod(leaf.shape)) * dtypes[leaf.path].itemsize for leaf in leaves)


def tensors_of(leaves: list[Leaf], dtypes: Mapping[str, np.dtype]) -> Tensors:
    """Their tensors with shape and dtype.

    Raises:
      ValueError: when the parts of a fused tensor are of different dtypes.
    """
    found: dict[str, np.dtype] = {}
    for leaf in leaves:
        for name in leaf.names:
            if found.setdefault(name, dtypes[leaf.path]) != dtypes[leaf.path]:
                raise ValueError(f"{leaf.path} is {dtypes[leaf.path]}, the rest of {name} {found[name]}; pass --dtype")
    return {name: (found[name], shape) for name, shape in hf_shapes(leaves).items()}


def _plan(
    verb: str, source: str, out: Location, leaves: list[Leaf], dtypes: Mapping[str, np.dtype], sidecars: int
) -> int:
    """Print what will happen, and refuse what cannot fit."""
    total, shapes = count_bytes(leaves, dtypes), hf_shapes(leaves)
    kinds = ", ".join(sorted({dtype.name for dtype in dtypes.values()}))
    numbers = sum(int(np.prod(shape)) for shape in shapes.values())
    say(f"{verb}: {source} -> {out}")
    say(f"  {len(shapes)} tensors, {numbers:,} parameters, {human(total)} as {kinds}; {sidecars} other files")
    require_space(total + total // 100, out)
    return total


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face → ours.


def to_jax(hf_dir: Location, out: Location, dtype: str, overwrite: bool) -> None:
    hf = HFDirectory(hf_dir)
    config = model_config(hf_dir)
    leaves = model_leaves(config)
    with closing(HFSource(hf, leaves)) as source:
        meta = {"step": 0, "source": {"kind": "huggingface", "directory": resolved(hf_dir).name}}
        assets = _assets(hf)
        _write_ours(source, leaves, config, out, dtype, overwrite, [hf_dir], meta, assets)


def compose(decoder_dir: Location, vision_dir: Location, out: Location, dtype: str, overwrite: bool, seed: int) -> None:
    """A start for training: a text-only Phi-4, a SigLIP-2, and a projector that was never trained."""
    text, siglip = HFDirectory(decoder_dir), HFDirectory(vision_dir)
    vision_json = read_json(vision_dir / "config.json")
    config = ModelConfig(
        decoder=decoder_config(read_json(decoder_dir / "config.json")),
        vision=vision_config(vision_json.get("vision_config", vision_json)),
    )
    decoder, vision = decoder_leaves(config.decoder), vision_leaves(config.vision, SIGLIP2_PREFIX)
    leaves = decoder + vision + projector_leaves(config)
    decoder_source = HFSource(text, decoder)
    vision_source = HFSource(siglip, vision, SIGLIP2_UNUSED)
    kept = CASTS[dtype] if dtype != "keep" else decoder_source.dtype(decoder[0])
    fresh = FreshProjector(kept, seed)
    parts = Parts({"decoder": decoder_source, "vision": vision_source, "projector": fresh})
    with closing(parts):
        names = {"decoder": resolved(decoder_dir).name, "vision": resolved(vision_dir).name}
        meta = {"step": 0, "source": {"kind": "composed", **names, "projector_seed": seed}}
        assets = _assets(text)
        # The decoder's own config.json describes another model.
        assets[PurePosixPath("config.json")] = json_bytes(config_json(config))
        assets |= _with_think_tokens(assets)
        if vision_source.unused:
            prefixes = ", ".join(SIGLIP2_UNUSED)
            say(f"ignoring {len(vision_source.unused)} tensors of {vision_dir} that have no place here ({prefixes})")
        say(f"projector: LeCun-normal kernels, zero biases, seed {seed}")
        _write_ours(parts, leaves, config, out, dtype, overwrite, [decoder_dir, vision_dir], meta, assets)


def _with_think_tokens(assets: Files) -> Files:
    """The tokenizer's files with ``<think>`` and ``</think>`` in the two places that Phi-4-reasoning gave them.

    A plain Phi-4 has unused tokens there, of the same ids.
    """
    renamed: Files = {}
    for name in map(PurePosixPath, ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")):
        content = assets.get(name)
        text = content if content is None or isinstance(content, bytes) else content.read_bytes()
        if text is not None and b"<think>" not in text and b"<|dummy_87|>" in text:
            renamed[name] = text.replace(b"<|dummy_86|>", b"<think>").replace(b"<|dummy_87|>", b"</think>")
    if renamed:
        say("tokenizer: <|dummy_86|> and <|dummy_87|> become <think> and </think>, as in Phi-4-reasoning")
    return renamed


def _write_ours(
    source: Source,
    leaves: list[Leaf],
    config: ModelConfig,
    out: Location,
    dtype: str,
    overwrite: bool,
    sources: list[Location],
    meta: Mapping[str, Any],
    assets: Files,
) -> None:
    dtypes = dtypes_of(source, leaves, dtype)
    total = _plan("to-jax", " + ".join(map(str, sources)), out, leaves, dtypes, len(assets))
    with _writing("to-jax", total, out, overwrite, sources) as (tmp, advance):
        sink = ours.OursSink(tmp, dtypes, leaves)
        copy(source, sink, leaves, dtypes, advance)
        _put(assets, tmp / "assets")
        sink.finish(config, meta)
    say(f"wrote {out}")


@contextmanager
def _writing(
    verb: str, total: int, out: Location, overwrite: bool, sources: list[Location]
) -> Iterator[tuple[Path, Callable[[int], None]]]:
    """The directory to fill, and whom to tell the bytes of tensors that are in it."""
    with (
        uploaded(out, overwrite, sources, say) as place,
        progress(verb, total) as advance,
        staged(place, overwrite, sources, say) as tmp,
    ):
        yield tmp, advance


def _assets(hf: HFDirectory) -> Files:
    """What is kept of a Hugging Face directory besides its tensors; a shard that no index names is not."""
    return {path: hf.directory / path for path in hf.sidecars() if path.suffix != ".safetensors"}


def _put(files: Files, directory: Path) -> None:
    for name, content in files.items():
        if isinstance(content, bytes):
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes(content)
        else:
            copy_file(content, directory / name)


def json_bytes(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


# ---------------------------------------------------------------------------------------------------------------------
# Ours → Hugging Face.


def find_checkpoint(path: Location) -> Location:
    """The checkpoint at ``path``; of a training run the newest step, and a line that says so."""
    found = find(path)
    if found != path:
        say(f"{path} is a training run; taking the newest step, {found.name}")
    return found


def open_ours(path: Location, *parts: str) -> tuple[Location, ModelConfig, list[Leaf], ours.OursSource]:
    """(where, configuration, table, source) of the checkpoint at ``path``; a line says when adapters are merged.

    Args:
      parts: whose files are read and compared with the checkpoint's manifest, where it has one, before anything else.

    Raises:
      ValueError: when one of these is damaged, or the checkpoint is not whole.
    """
    found = find_checkpoint(path)
    if PARAMS in parts and (found / manifest.MANIFEST).exists():
        say(f"{found}: reading its files once, to check them")
    manifest.check(found, parts)
    config, _ = read_meta(found)
    leaves = model_leaves(config)
    source = ours.OursSource(found, leaves)
    if source.adapters is not None:
        say(f"{found} has {source.adapters}; they are merged as they are read")
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
    parts = (META, PARAMS, ASSETS) if like is None else (META, PARAMS)
    found, config, leaves, source = open_ours(checkpoint, *parts)
    with closing(source):
        expressible = config
        if force:
            expressible = dataclasses.replace(
                config, image_attention="causal", image_layout="naflex", projector=ProjectorConfig()
            )
        config_json(expressible)  # raises for what config.json cannot say
        dtypes = dtypes_of(source, leaves, dtype)
        tensors = tensors_of(leaves, dtypes)
        if like is None:
            headers, files = _new_layout(expressible, tensors, found / "assets", shard_bytes)
        else:
            headers, files = _layout_like(HFDirectory(like), expressible, tensors)
        total = _plan("to-hf", str(found), out, leaves, dtypes, len(files))
        sources = [found] if like is None else [found, like]
        with _writing("to-hf", total, out, overwrite, sources) as (tmp, advance):
            with closing(HFSink(tmp, headers)) as sink:
                copy(source, sink, leaves, dtypes, advance)
            _put(files, tmp)
    say(f"wrote {out}")


def _new_layout(
    config: ModelConfig, tensors: Tensors, assets: Location, shard_bytes: int
) -> tuple[dict[str, bytes], Files]:
    headers, index = plan_shards(tensors, shard_bytes)
    found = (name for name in map(PurePosixPath, storage.files(assets)) if name.name != ORBAX_MARK)
    files: Files = {name: assets / name for name in found}
    if index is not None:
        files[PurePosixPath(INDEX)] = index
    base = read_json(assets / "config.json") if PurePosixPath("config.json") in files else None
    values = config_json(config, base)
    kinds = {dtype.name for dtype, _ in tensors.values()}
    if len(kinds) == 1:  # mixed dtypes are for the tensors themselves to say
        key = "torch_dtype" if "torch_dtype" in values else "dtype"
        values[key] = kinds.pop()
    if values != base:
        files[PurePosixPath("config.json")] = json_bytes(values)
    return headers, files


def _layout_like(hf: HFDirectory, config: ModelConfig, tensors: Tensors) -> tuple[dict[str, bytes], Files]:
    """The headers, index and other files of ``hf``, byte for byte."""
    where = f"--like {hf.directory}"
    check(
        {name: entry.shape for name, entry in hf.entries.items()},
        {n: shape for n, (_, shape) in tensors.items()},
        where,
    )
    for name, entry in hf.entries.items():
        if entry.dtype != tensors[name][0]:
            raise ValueError(
                f"{where} has {name} as {entry.dtype}, this checkpoint as {tensors[name][0]}; pass --dtype"
            )
    if model_config(hf.directory) != config:
        raise ValueError(f"{where}: its config.json describes another model than this checkpoint's")
    files: Files = {path: hf.directory / path for path in hf.sidecars()}
    if INDEX in hf.files:
        files[PurePosixPath(INDEX)] = hf.directory / INDEX
    return hf.headers, files
