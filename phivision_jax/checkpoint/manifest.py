"""MANIFEST: what every file of a checkpoint held when it was whole.

    5e3f0a91       4096 params/d/2795a04d34a81b09307736824b803cfe      CRC-32, bytes, path
    …
    0c77b1d2         27 .                                              the same of all lines above; how many files

Array checksums (``checksums.py``) tell that the numbers are those that stood on the device; this file covers every
other byte: metadata, tokenizer, Orbax's own bookkeeping, chunks that nothing refers to. CRC-32 is sure of any single
flipped bit and of any burst up to 32 bits, and costs no more than reading does; SHA-256 would only add protection
against somebody who means harm.

A checkpoint of a large model is hundreds of gigabytes, so each process of a run reads its share of the files. Whoever
wants the weights alone (``loading``, the converter) has only the parts checked that it reads, and not the optimizer's
state, which is twice as large.

``sealed.json``, beside the steps of a run, lists those that have had a manifest.

In a bucket all is the same: there an object that is written is whole by itself, and files are read range by range.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

from phivision_jax.checkpoint.layout import SEALED
from phivision_jax.io import storage
from phivision_jax.io.storage import Location

MANIFEST = "MANIFEST"
_READ_BYTES = 1 << 22
_FETCH_BYTES = 1 << 25
"""The same from a bucket, where a request costs tens of milliseconds."""
_THREADS, _FETCHES = 4, 16
_WAIT = 1200.0
"""Seconds that the first process waits for the others to have read their share of the files."""
_WORK = ".sealing-"
"""Where shares are put together, beside the steps."""


def describe(checkpoint: Location, share: int = 0, shares: int = 1) -> dict[str, tuple[int, int]]:
    """CRC-32 and size of this process's share of the files: {path: (crc, bytes)}."""
    found = storage.files(checkpoint)
    mine = _share((name for name in found if name != MANIFEST), share, shares)
    return _describe(checkpoint, {name: found[name] for name in mine})


def render(entries: dict[str, tuple[int, int]]) -> bytes:
    """The file's bytes: one text for one set of entries, so that any other text is damage."""
    lines = "".join(f"{crc:08x} {size:10d} {name}\n" for name, (crc, size) in sorted(entries.items())).encode()
    return lines + f"{zlib.crc32(lines):08x} {len(entries):10d} .\n".encode()


def parse(text: bytes) -> dict[str, tuple[int, int]]:
    """What ``render`` was given.

    Raises:
      ValueError: when it is not, byte for byte, what ``render`` writes.
    """
    entries = {}
    for line in text.decode(errors="replace").split("\n")[:-2]:
        crc, size, name = line.split(maxsplit=2)
        entries[name] = (int(crc, 16), int(size))
    if render(entries) != text:
        raise ValueError("does not have the checksum that it states")
    return entries


def check(
    checkpoint: Location,
    parts: Collection[str],
    share: int = 0,
    shares: int = 1,
    first_error: Callable[[str | None], str | None] = lambda wrong: wrong,
) -> None:
    """Refuse a checkpoint in whose parts a file is not as it was written; one without a manifest is taken as it is.

    Args:
      parts: as for ``damage``, of which share and shares are too.
      first_error: what one process says, on all of them; called by each that calls this.

    Raises:
      ValueError: naming the file.
      StorageError: when the bucket does not answer.
    """
    try:
        wrong = damage(checkpoint, share, shares, parts)
    except FileNotFoundError:  # a conversion, or a step that was killed before it was sealed
        wrong = None
    if wrong := first_error(wrong):
        raise ValueError(f"{checkpoint} is damaged: {wrong}; bring back a copy of it, or take another step of its run")


def damage(checkpoint: Location, share: int = 0, shares: int = 1, parts: Collection[str] | None = None) -> str | None:
    """What is wrong with this process's share of the files, as half a sentence that names one; None: nothing.

    Files that the manifest does not list are none of its business.

    Args:
      parts: the folders to look into ("params", "meta", …); None: every file.

    Raises:
      FileNotFoundError: when there is no manifest.
      StorageError: when the bucket does not answer, which is no damage.
    """
    try:
        with storage.wrap_storage_errors(checkpoint):
            wanted = parse((checkpoint / MANIFEST).read_bytes())
    except ValueError:
        return f"its file {MANIFEST} is damaged"
    looked_at = [name for name in wanted if parts is None or name.partition("/")[0] in parts]
    mine, sizes = _share(looked_at, share, shares), storage.files(checkpoint)
    for name in mine:  # sizes first: they cost nothing
        if name not in sizes:
            return f"its file {name} is missing"
        if sizes[name] != wanted[name][1]:
            return f"its file {name} has {sizes[name]:,} bytes, not the {wanted[name][1]:,} that were written"
    try:
        found = _describe(checkpoint, {name: sizes[name] for name in mine})
    except storage.StorageError:
        raise
    except OSError as error:
        return f"a file cannot be read: {error}"
    changed = [name for name in mine if found[name] != wanted[name]]
    return f"its file {changed[0]} does not hold the bytes that were written" if changed else None


def _share(names: Iterable[str], share: int, shares: int) -> list[str]:
    """Every process must cut alike, from the same names; which file is large it cannot know before it looks."""
    return sorted(names)[share::shares]


def _describe(checkpoint: Location, sizes: dict[str, int]) -> dict[str, tuple[int, int]]:
    with concurrent.futures.ThreadPoolExecutor(_FETCHES if storage.is_remote(checkpoint) else _THREADS) as pool:
        return dict(zip(sizes, pool.map(lambda name: _crc(checkpoint / name, sizes[name]), sizes), strict=True))


def _crc(path: Location, listed: int) -> tuple[int, int]:
    crc = size = 0
    for block in _blocks(path, listed):
        crc, size = zlib.crc32(block, crc), size + len(block)
    return crc, size


def _blocks(path: Location, listed: int) -> Iterator[bytes]:
    if not isinstance(path, Path):
        for start in range(0, listed, _FETCH_BYTES):
            yield storage.read_range(path, start, min(_FETCH_BYTES, listed - start))
        return
    with path.open("rb", buffering=0) as file:
        while block := file.read(_READ_BYTES):
            yield block


def seal(directory: Location, step: int, share: int, shares: int) -> None:
    """Read this process's share of a step's files; the first process puts all shares together as the manifest.

    The processes meet in the file system alone: this runs beside training, which owns the devices.

    Raises:
      TimeoutError: in the first process, when another one does not come.
      StorageError: when the bucket does not answer.
    """
    with storage.wrap_storage_errors(directory):
        _seal(directory, step, share, shares)


def _seal(directory: Location, step: int, share: int, shares: int) -> None:
    checkpoint, work = directory / str(step), directory / f"{_WORK}{step}"
    if isinstance(work, Path):
        work.mkdir(exist_ok=True)
    _replace(work / str(share), render(describe(checkpoint, share, shares)), work / f"{share}.partial")
    if share != 0:
        return
    deadline = time.monotonic() + _WAIT
    while missing := [i for i in range(shares) if not (work / str(i)).exists()]:
        if time.monotonic() > deadline:
            raise TimeoutError(f"process {missing[0]} has not read its files again after {_WAIT:.0f} s")
        time.sleep(1.0 if storage.is_remote(work) else 0.2)
    parts = [parse((work / str(i)).read_bytes()) for i in range(shares)]
    content = render({name: entry for part in parts for name, entry in part.items()})
    _replace(checkpoint / MANIFEST, content, work / MANIFEST)
    there = {child.name for child in storage.children(directory)}
    steps = sorted(other for other in {step, *sealed(directory)} if str(other) in there)
    _replace(directory / SEALED, json.dumps(steps).encode(), work / SEALED)
    _remove(work)


def sealed(directory: Location) -> set[int]:
    """The steps that have had a manifest, as far as ``sealed.json`` can say."""
    try:
        return {step for step in json.loads((directory / SEALED).read_bytes()) if isinstance(step, int)}
    except (FileNotFoundError, ValueError, TypeError):
        return set()


def sweep(directory: Location) -> None:
    """Remove what a kill has left of ``seal``; shares of another time must not be taken for new ones."""
    for work in storage.children(directory):
        if work.name.startswith(_WORK):
            _remove(work)


def _remove(work: Location) -> None:
    if isinstance(work, Path):
        shutil.rmtree(work)
    else:
        storage.remove(work)


def _replace(path: Location, content: bytes, partial: Location) -> None:
    """Write a file so that it is there whole or not at all; ``partial``, on the same disk, is where it is made."""
    if not isinstance(path, Path) or not isinstance(partial, Path):
        path.write_bytes(content)
        return
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
