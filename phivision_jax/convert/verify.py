"""Looking without changing: `verify` two checkpoints of either kind, `inspect` one."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from phivision_jax.checkpoint.layout import META, PARAMS
from phivision_jax.config import ModelConfig
from phivision_jax.convert.hf import INDEX, HFDirectory, HFSource
from phivision_jax.convert.hf_config import model_config
from phivision_jax.convert.jobs import count_bytes, dtypes_of, open_ours, progress, tensors_of
from phivision_jax.convert.mapping import Leaf, model_leaves
from phivision_jax.convert.ours import BLOCK_BYTES
from phivision_jax.convert.output import human
from phivision_jax.convert.stream import Difference, Source, compare
from phivision_jax.io import storage
from phivision_jax.io.storage import Location

_out = Console(highlight=False, soft_wrap=True)
_LISTED = 12


@dataclasses.dataclass(frozen=True)
class Opened:
    """A checkpoint of either kind."""

    path: Location
    kind: str
    config: ModelConfig
    leaves: list[Leaf]
    source: Source
    hf: HFDirectory | None = None


def open_checkpoint(path: Location, *parts: str) -> Opened:
    """Raises ValueError when ``path`` is neither kind of checkpoint, not a whole one, or damaged in these parts."""
    storage.check(path)
    if not path.is_dir():
        raise ValueError(f"{path} is not a directory")
    if (path / "config.json").is_file():
        hf = HFDirectory(path)
        config = model_config(path)
        leaves = model_leaves(config)
        return Opened(path, "Hugging Face", config, leaves, HFSource(hf, leaves), hf)
    if any(".safetensors" in child.name for child in path.iterdir()):
        raise ValueError(f"{path} has no config.json: without it the tensors have no meaning")
    found, config, leaves, source = open_ours(path, *parts)
    return Opened(found, "phivision_jax", config, leaves, source)


def verify(path_a: Location, path_b: Location) -> bool:
    """Print how two checkpoints differ; True when no value does (and between two Hugging Face directories, no file)."""
    a, b = (open_checkpoint(path, META, PARAMS) for path in (path_a, path_b))
    if [(leaf.path, leaf.shape) for leaf in a.leaves] != [(leaf.path, leaf.shape) for leaf in b.leaves]:
        raise ValueError(f"{a.path} and {b.path} are different architectures; `inspect` shows each")
    with progress("verify", count_bytes(a.leaves, dtypes_of(a.source, a.leaves, "keep"))) as advance:
        found = compare(a.source, b.source, a.leaves, advance)
    differing = {name: d for name, d in found.items() if not d.same_values}
    same_bytes = sum(d.same_bytes for d in found.values())
    table = Table("tensors", "count", title=f"{a.path} ({a.kind})  |  {b.path} ({b.kind})")
    table.add_row("identical bytes", str(same_bytes))
    table.add_row("equal values, other bytes", str(len(found) - same_bytes - len(differing)))
    table.add_row("different", str(len(differing)))
    _out.print(table)
    for name, d in list(differing.items())[:_LISTED]:
        _out.print(f"different: {name}, max abs error {d.max_error:.3g}", markup=False)
    if len(differing) > _LISTED:
        _out.print(f"… and {len(differing) - _LISTED} more")
    if a.config != b.config:
        _out.print("configurations differ (inspect shows each)")
    same_files = a.hf is None or b.hf is None or _verify_files(a.hf, b.hf, found)
    same = not differing and a.config == b.config and same_files
    _out.print("same" if same else "NOT the same")
    return same


def _verify_files(a: HFDirectory, b: HFDirectory, found: dict[str, Difference]) -> bool:
    def names(hf: HFDirectory) -> set[PurePosixPath]:
        return {*hf.sidecars(), *(PurePosixPath(name) for name in (*hf.headers, INDEX) if name in hf.files)}

    both = sorted(names(a) & names(b))
    differing = [name for name in both if not _same_file(a, b, str(name), found)]
    alone = sorted(names(a) ^ names(b))
    _out.print(
        f"files: {len(both) - len(differing)} byte-identical, {len(differing)} different, {len(alone)} on one side only"
    )
    for name in (*differing, *alone)[:_LISTED]:
        _out.print(f"  {name}", markup=False)
    return not differing and not alone


def _same_file(a: HFDirectory, b: HFDirectory, name: str, found: dict[str, Difference]) -> bool:
    if name in a.headers and name in b.headers:  # every byte after a header is a tensor's, and these are compared
        tensors = (tensor for tensor, entry in a.entries.items() if entry.file.name == name)
        return a.headers[name] == b.headers[name] and all(found[tensor].same_bytes for tensor in tensors)
    size = a.files[name]
    return size == b.files[name] and all(
        storage.read_range(a.directory / name, start, BLOCK_BYTES)
        == storage.read_range(b.directory / name, start, BLOCK_BYTES)
        for start in range(0, size, BLOCK_BYTES)
    )


def inspect(path: Location, as_json: bool) -> None:
    """Print what a checkpoint of either kind is and holds; no weight is read for it, and none checked."""
    opened = open_checkpoint(path, META)
    dtypes = dtypes_of(opened.source, opened.leaves, "keep")
    tensors = tensors_of(opened.leaves, dtypes)
    total = count_bytes(opened.leaves, dtypes)
    count = sum(math.prod(shape) for _, shape in tensors.values())
    config: dict[str, Any] = dataclasses.asdict(opened.config)
    if as_json:
        listed = {name: {"shape": list(shape), "dtype": dtype.name} for name, (dtype, shape) in tensors.items()}
        head = {"path": str(opened.path), "kind": opened.kind, "config": config}
        print(json.dumps({**head, "tensors": listed, "num_tensors": len(tensors), "parameters": count, "bytes": total}))
        return
    table = Table("tensor", "shape", "dtype")
    for name, (dtype, shape) in tensors.items():
        table.add_row(name, str(list(shape)), np.dtype(dtype).name)
    _out.print(table)
    _out.print(json.dumps(config, indent=2), markup=False)
    _out.print(
        f"{opened.path}: {opened.kind}, {len(tensors)} tensors, {count:,} parameters, {human(total)}", markup=False
    )
