"""MANIFEST: what every file of a checkpoint held when it was whole.

    5e3f0a91       4096 params/d/2795a04d34a81b09307736824b803cfe      CRC-32, bytes, path
    …
    0c77b1d2         27 .                                              the same of all lines above; how many files

Array checksums (``checksums.py``) tell that the numbers are those that stood on the device; this file covers every
other byte: metadata, tokenizer, Orbax's own bookkeeping, chunks that nothing refers to. CRC-32 is sure of any single
flipped bit and of any burst up to 32 bits, and costs no more than reading does; SHA-256 would only add protection
against somebody who means harm.

A checkpoint of a large model is hundreds of gigabytes, so each process of a run reads its share of the files.

``sealed.json``, beside the steps of a run, lists those that have had a manifest.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import shutil
import time
import zlib
from collections.abc import Iterable
from pathlib import Path

from phivision_jax.checkpoint import SEALED

MANIFEST = "MANIFEST"
_READ_BYTES = 1 << 22
_THREADS = 4
_WAIT = 1200.0
"""Seconds that the first process waits for the others to have read their share of the files."""
_WORK = ".sealing-"
"""Where shares are put together, beside the steps."""


def describe(checkpoint: Path, share: int = 0, shares: int = 1) -> dict[str, tuple[int, int]]:
    """CRC-32 and size of this process's share of the files: {path: (crc, bytes)}."""
    names = (path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file())
    return _describe(checkpoint, _share((name for name in names if name != MANIFEST), share, shares))


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


def damage(checkpoint: Path, share: int = 0, shares: int = 1) -> str | None:
    """What is wrong with this process's share of the files, as half a sentence that names one; None: nothing.

    Files that the manifest does not list are none of its business.

    Raises:
      FileNotFoundError: when there is no manifest.
    """
    try:
        wanted = parse((checkpoint / MANIFEST).read_bytes())
    except ValueError:
        return f"its file {MANIFEST} is damaged"
    mine = _share(wanted, share, shares)
    for name in mine:  # sizes first: they cost nothing
        path = checkpoint / name
        if not path.is_file():
            return f"its file {name} is missing"
        if (size := path.stat().st_size) != wanted[name][1]:
            return f"its file {name} has {size:,} bytes, not the {wanted[name][1]:,} that were written"
    try:
        found = _describe(checkpoint, mine)
    except OSError as error:
        return f"a file cannot be read: {error}"
    changed = [name for name in mine if found[name] != wanted[name]]
    return f"its file {changed[0]} does not hold the bytes that were written" if changed else None


def _share(names: Iterable[str], share: int, shares: int) -> list[str]:
    """Every process must cut alike, from the same names; which file is large it cannot know before it looks."""
    return sorted(names)[share::shares]


def _describe(checkpoint: Path, names: list[str]) -> dict[str, tuple[int, int]]:
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: _crc(checkpoint / name), names), strict=True))


def _crc(path: Path) -> tuple[int, int]:
    crc = size = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(_READ_BYTES):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return crc, size


def seal(directory: Path, step: int, share: int, shares: int) -> None:
    """Read this process's share of a step's files; the first process puts all shares together as the manifest.

    The processes meet in the file system alone: this runs beside training, which owns the devices.

    Raises:
      TimeoutError: in the first process, when another one does not come.
    """
    checkpoint, work = directory / str(step), directory / f"{_WORK}{step}"
    work.mkdir(exist_ok=True)
    _replace(work / str(share), render(describe(checkpoint, share, shares)), work / f"{share}.partial")
    if share != 0:
        return
    deadline = time.monotonic() + _WAIT
    while missing := [i for i in range(shares) if not (work / str(i)).exists()]:
        if time.monotonic() > deadline:
            raise TimeoutError(f"process {missing[0]} has not read its files again after {_WAIT:.0f} s")
        time.sleep(0.2)
    parts = [parse((work / str(i)).read_bytes()) for i in range(shares)]
    content = render({name: entry for part in parts for name, entry in part.items()})
    _replace(checkpoint / MANIFEST, content, work / MANIFEST)
    steps = [other for other in {step, *sealed(directory)} if (directory / str(other)).is_dir()]
    _replace(directory / SEALED, json.dumps(sorted(steps)).encode(), work / SEALED)
    shutil.rmtree(work)


def sealed(directory: Path) -> set[int]:
    """The steps that have had a manifest, as far as ``sealed.json`` can say."""
    try:
        return {step for step in json.loads((directory / SEALED).read_bytes()) if isinstance(step, int)}
    except (FileNotFoundError, ValueError, TypeError):
        return set()


def sweep(directory: Path) -> None:
    """Remove what a kill has left of ``seal``; shares of another time must not be taken for new ones."""
    for work in directory.glob(f"{_WORK}*"):
        shutil.rmtree(work)


def _replace(path: Path, content: bytes, partial: Path) -> None:
    """Write a file so that it is there whole or not at all; ``partial``, on the same disk, is where it is made."""
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
