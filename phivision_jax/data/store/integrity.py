"""Validation: does a dataset still hold what was imported, and can every image be decoded?

The sha256 of every file shows damage by copying or by a disk; reading every record and decoding every image names the
records that it hit, and those that were broken before they were imported.
"""

import contextlib
import hashlib
import itertools
import operator
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from phivision_jax.data.image_check import check_image
from phivision_jax.data.quarantine import BadRecord, Quarantined
from phivision_jax.data.records import MODES, Record, mode_of
from phivision_jax.data.store.dataset import (
    Dataset,
    Index,
    check_size,
    describe_file,
    read_manifest,
)
from phivision_jax.data.store.shard_files import Shard, open_shard, read_record
from phivision_jax.io import workers as processes
from phivision_jax.io.files import locate
from phivision_jax.io.progress import bar
from phivision_jax.io.workers import Stop, Stopped

_LISTED_DUPLICATES = 10


class Report(NamedTuple):
    files: int
    records: int
    images: int
    problems: list[Quarantined]
    """Damaged files and records. ``where`` is the file, and the record's number in the dataset; ``id`` is empty for
    files and for records that cannot be read; ``reason`` is one of the quarantine's, "file" or "index"."""
    duplicates: int
    """Records with the id of an earlier one: harmless to training, but messages that name an id are ambiguous."""
    duplicate_ids: list[str]
    """The first few of these ids."""


type _ShardReport = tuple[int, int, list[Quarantined], np.ndarray]
"""Number of the shard's first record in the dataset, images, problems, and a hash of each id: [records] u64, 0 where a
record cannot be read."""


def validate(
    directory: str | os.PathLike[str], *, decode: bool = True, workers: int | None = None, progress: bool = True
) -> Report:
    """Check every file, record and image of a dataset.

    Args:
      directory: of a dataset.
      decode: decode every image; else only the headers are read.
      workers: worker processes; default: one per core; 0: this process.

    Raises:
      FileNotFoundError: when there is no dataset.
      ValueError: when its manifest cannot be read.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    problems = [problem for file in manifest["index"] for problem in _file_problems(directory, file)]
    if not problems:
        try:
            Index.open(directory, manifest).check(directory)
        except (OSError, ValueError) as error:
            problems.append(Quarantined("", "", "index", str(error), "index"))
    shards = manifest["shards"]
    firsts = itertools.accumulate((shard["records"] for shard in shards), initial=0)
    jobs = list(zip(shards, firsts, strict=False))
    reports: list[_ShardReport] = []
    if not problems:  # a damaged index would contradict every record
        results = processes.run(_check_shard, (directory, manifest, decode), jobs, workers)
        title = f"validate {directory.name}"
        with bar(title, manifest["records"], shown=progress) as advance, contextlib.closing(results):
            for report in results:
                reports.append(report)
                advance(len(report[-1]))
    reports.sort(key=operator.itemgetter(0))
    hashes = np.concatenate([np.zeros(0, np.uint64), *(hashes for *_, hashes in reports)])
    # The records whose hash an earlier record has.
    order = np.argsort(hashes, kind="stable")
    again = (hashes[order][1:] == hashes[order][:-1]) & (hashes[order][1:] != 0)
    duplicates = sorted(order[1:][again].tolist())
    return Report(
        files=len(shards) + len(manifest["index"]),
        records=len(hashes),
        images=sum(images for _, images, _, _ in reports),
        problems=problems + [problem for _, _, found, _ in reports for problem in found],
        duplicates=len(duplicates),
        duplicate_ids=[Dataset(directory, manifest)[i].id for i in duplicates[:_LISTED_DUPLICATES]],
    )


def _file_problems(directory: Path, file: Mapping[str, Any]) -> list[Quarantined]:
    """Compare a file with its entry in the manifest."""
    try:
        check_size(directory, file)
        sound = describe_file(directory, file["file"])["sha256"] == file["sha256"]
        detail = "" if sound else "its sha256 is not the manifest's"
    except (OSError, ValueError) as error:
        detail = f"it cannot be read: {error}"
    return [Quarantined("", "", "file", detail, file["file"])] if detail else []


def _check_shard(
    directory: Path, manifest: Mapping[str, Any], decode: bool, job: tuple[Mapping[str, Any], int], stopped: Stopped
) -> _ShardReport:
    file, first = job
    hashes = np.zeros(file["records"], np.uint64)
    index = Index.open(directory, manifest)  # memory-mapped: no index is sent to the workers
    images, problems = 0, _file_problems(directory, file)
    try:
        shard = Shard(locate(directory, file["file"]), file["records"])
        reader = open_shard(shard)
    except (OSError, ValueError) as error:
        unreadable = Quarantined("", "", "file", f"it cannot be read: {error}", file["file"])
        return first, 0, problems or [unreadable], hashes
    for i in range(shard.records):
        if stopped():
            raise Stop
        record_id, source, reason, detail = "", "", "unreadable", ""
        try:
            record = Record.from_bytes(read_record(reader, shard, i))
            record_id, source, reason = record.id, record.source, "index"
            digest = hashlib.blake2b(record.id.encode(), digest_size=8).digest()
            hashes[i] = max(1, int.from_bytes(digest, "little"))
            images += len(record.images)
            _compare(record, index, first + i, decode)
        except BadRecord as bad:
            reason, detail = bad.reason, str(bad)
        except Exception as error:  # bytes that are not what was written can raise anything
            detail = f"{error!s:.300}" or type(error).__name__
        if detail:
            where = f"{file['file']}, record {first + i} of the dataset"
            problems.append(Quarantined(record_id, source, reason, detail, where))
    return first, images, problems, hashes


def _compare(record: Record, index: Index, i: int, decode: bool) -> None:
    """Compare a record with its row of the index.

    Raises:
      BadRecord: when an image is broken.
      ValueError: when they differ.
    """
    sizes = [check_image(image, f"image {k}", decode=decode) for k, image in enumerate(record.images)]
    found = {"mode": mode_of(record), "task": record.task, "image sizes": sizes}
    stored = {"mode": MODES[index.modes[i]], "task": index.task_names[index.tasks[i]], "image sizes": index.sizes_of(i)}
    for name, value in found.items():
        if value != stored[name]:
            raise ValueError(f"{name}: {value}, but {stored[name]} in the index")
