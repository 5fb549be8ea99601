"""Compare two checkpoints of either kind, and describe one."""

import dataclasses
import json
import math
import re
import sys
from collections.abc import Mapping
from typing import Any

from rich.filesize import decimal

from phivision_jax.config import ModelConfig
from phivision_jax.convert import hf_config, jobs, mapping, ours, stream
from phivision_jax.convert.hf import HFDirectory, HFSource
from phivision_jax.io import storage
from phivision_jax.io.messages import differences, printable
from phivision_jax.io.progress import bar
from phivision_jax.io.storage import Location

_LISTED = 12


def open_checkpoint(path: Location) -> tuple[Location, ModelConfig, HFSource | ours.OursSource]:
    """Open a checkpoint of either kind, as ``open_ours``; raises ValueError for a directory of neither."""
    storage.check(path)
    if not path.is_dir():
        raise ValueError(f"{path} is not a directory")
    if hf_config.is_hf(path):
        hf, config = HFDirectory(path), hf_config.model_config(path)
        return path, config, HFSource(hf, mapping.model_leaves(config))
    return jobs.open_ours(path)


def verify(path_a: Location, path_b: Location) -> bool:
    """Print how two checkpoints differ.

    Returns:
      Whether no value differs, nor, between two Hugging Face directories, any file.

    Raises:
      ValueError: when they are different architectures, or as ``open_checkpoint``.
    """
    (path_a, config_a, a), (path_b, config_b, b) = map(open_checkpoint, (path_a, path_b))
    pairs = differences(dataclasses.asdict(config_a), dataclasses.asdict(config_b))
    fields = [f"{path} is {one} and {other}" for path, one, other in pairs]
    if [(leaf.path, leaf.shape) for leaf in a.leaves] != [(leaf.path, leaf.shape) for leaf in b.leaves]:
        raise ValueError(f"{path_a} and {path_b} are different architectures: {'; '.join(fields[:6])}")
    total = jobs.count_bytes(jobs.dtypes_of([a], "keep"))
    with bar("verify", total, in_bytes=True, shown=sys.stderr.isatty()) as advance:
        errors = stream.compare(a, b, advance)
    differing = {name: error for name, error in errors.items() if error.values}
    identical = sum(not error.blocks for error in errors.values())
    print(f"{path_a} ({a.kind}) and {path_b} ({b.kind}):")
    print(f"  {identical} tensors with identical bytes,", end=" ")
    print(f"{len(errors) - identical - len(differing)} with equal values in other bytes,\n  {len(differing)} different")
    sizes = {name: math.prod(shape) for name, shape in mapping.hf_shapes(a.leaves).items()}
    _print_some([
        f"different: {name}, {found.values:,} of {sizes[name]:,} values, the first at {[*found.first]}, "
        f"largest error {found.absolute:.3g}, relative {found.relative:.3g}"
        for name, found in differing.items()
    ])  # fmt: skip
    _print_some([f"configuration: {field}" for field in fields])
    same = not differing and config_a == config_b
    if isinstance(a, HFSource) and isinstance(b, HFSource):
        same &= _compare_files(a.hf, b.hf, errors)
    print("same" if same else "NOT the same")
    return same


def _print_some(lines: list[str]) -> None:
    for line in [*lines[:_LISTED], *([f"… and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else [])]:
        print(printable(line))


def _compare_files(a: HFDirectory, b: HFDirectory, errors: Mapping[str, stream.Difference]) -> bool:
    names = [{*hf.others, *hf.headers} for hf in (a, b)]
    both, alone = sorted(names[0] & names[1]), sorted(names[0] ^ names[1])
    differing = [name for name in both if not _same_file(a, b, name, errors)]
    counts = f"{len(both) - len(differing)} byte-identical, {len(differing)} different, {len(alone)} on one side only"
    print(f"files: {counts}")
    _print_some([f"  {name}" for name in (*differing, *alone)])
    return not differing and not alone


def _same_file(a: HFDirectory, b: HFDirectory, name: str, errors: Mapping[str, stream.Difference]) -> bool:
    if name in a.headers and name in b.headers:  # the bytes after a header are tensors, which were compared
        tensors = (tensor for tensor, entry in a.entries.items() if entry.file.name == name)
        return a.headers[name] == b.headers[name] and not any(errors[tensor].blocks for tensor in tensors)
    files, step = (a.directory / name, b.directory / name), ours.BLOCK_BYTES
    blocks = ([storage.read_range(file, start, step) for file in files] for start in range(0, a.files[name], step))
    return a.files[name] == b.files[name] and all(one == other for one, other in blocks)


def inspect(path: Location, as_json: bool) -> None:
    """Print the configuration and the tensors of a checkpoint of either kind, without reading weights."""
    path, model, source = open_checkpoint(path)
    dtypes = jobs.dtypes_of([source], "keep")
    tensors, total = jobs.tensors_of(dtypes), jobs.count_bytes(dtypes)
    count = sum(math.prod(shape) for _, shape in tensors.values())
    config: dict[str, Any] = dataclasses.asdict(model)
    if as_json:
        listed = {name: {"shape": list(shape), "dtype": dtype.name} for name, (dtype, shape) in tensors.items()}
        head = {"path": str(path), "kind": source.kind, "config": config}
        print(json.dumps({**head, "tensors": listed, "num_tensors": len(tensors), "parameters": count, "bytes": total}))
        return
    lines = {name: f"{dtype.name:8}  {[*shape]}" for name, (dtype, shape) in tensors.items()}
    lines = _group_layers(lines) if sys.stdout.isatty() else lines
    print(*(f"{name:{max(map(len, lines))}}  {line}" for name, line in lines.items()), sep="\n")
    print(json.dumps(config, indent=2))
    print(f"{path} ({source.kind}): {len(tensors)} tensors, {count:,} parameters, {decimal(total)}")


def _group_layers(lines: Mapping[str, str]) -> dict[str, str]:
    """One line for the tensors of several layers that differ in the number alone, as "layers.{0..39}.mlp"."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, line in lines.items():
        pattern, number = re.sub(r"\.layers\.\d+\.", ".layers.{}.", name), re.search(r"\.layers\.(\d+)\.", name)
        groups.setdefault((pattern, line), []).append(number[1] if number else "")
    return {
        pattern.replace("{}", numbers[0] if len(numbers) == 1 else f"{{{numbers[0]}..{numbers[-1]}}}"): line
        for (pattern, line), numbers in groups.items()
    }
