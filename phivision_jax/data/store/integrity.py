"""Is a dataset still what was imported? Every byte, every record and every pixel is looked at again.

An import vouches for what it wrote; this is for afterwards: a copy over a network, a disk that forgets, records whose
pixels no one has decoded yet.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from phivision_jax.data.quarantine import BadRecord
from phivision_jax.data.records import MODES, TASKS, Record, mode_of
from phivision_jax.data.store.dataset import Dataset, Index, check_size, describe_file, read_manifest
from phivision_jax.data.store.record_check import measure, measure_images
from phivision_jax.data.store.shard_files import Shard, open_shard, read_record
from phivision_jax.io import progress as bars
from phivision_jax.io import workers as processes
from phivision_jax.io.workers import Stop, Stopped

if TYPE_CHECKING:
    from phivision_jax.processor import Processor

_NAMED = 10  # Duplicate ids that are named.


@dataclasses.dataclass(frozen=True)
class Problem:
    """A file or a record that is not as it should be."""

    where: str
    """The file, and the record's number in the dataset."""
    id: str
    """The record's; empty where it cannot be read, and for files."""
    reason: str
    """A reason of the quarantine, or "file", "unreadable" or "index"."""
    detail: str

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)


@dataclasses.dataclass(frozen=True)
class Report:
    files: int
    records: int
    images: int
    problems: list[Problem]
    duplicates: int
    """Records whose id an earlier one has: harmless to training, but two records are then called alike."""
    duplicate_ids: list[str]
    """Some of these ids."""


@dataclasses.dataclass(frozen=True)
class _Job:
    file: Mapping[str, Any]
    """The shard's entry in the manifest."""
    first: int
    """Number of its first record in the dataset."""


@dataclasses.dataclass(frozen=True)
class _ShardReport:
    job: _Job
    images: int
    problems: list[Problem]
    id_hashes: bytes
    """[records] u64, 0 where a record cannot be read."""


def validate(
    directory: str | os.PathLike[str],
    processor: Processor | None = None,
    *,
    decode: bool = True,
    workers: int | None = None,
    progress: bool = True,
) -> Report:
    """Look at everything again.

    Args:
      directory: of a dataset.
      processor: of the import, to count the text tokens again; None: texts are left alone.
      decode: decode every image; else only their headers are read.
      workers: processes; default: one per core; 0: in this one.

    Raises:
      FileNotFoundError: when there is no dataset.
      ValueError: when its manifest cannot be read, or it was imported with another tokenizer or template.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    if processor is not None and processor.text_fingerprint != manifest["text"]:
        raise ValueError(
            f"{directory} was imported with another tokenizer or chat template: validate it with the checkpoint that "
            "it was imported with, or import it again with this one"
        )
    problems = list(_index_problems(directory, manifest))
    firsts = itertools.accumulate((shard["records"] for shard in manifest["shards"]), initial=0)
    jobs = [_Job(shard, first) for shard, first in zip(manifest["shards"], firsts, strict=False)]
    reports: list[_ShardReport] = []
    count = min(os.cpu_count() or 1 if workers is None else workers, len(jobs))
    if not problems:  # With another index every record would differ from it.
        results = processes.run(_check_shard, (directory, processor, decode), jobs, count)
        with (
            bars.bar(f"validate {directory.name}", manifest["records"], shown=progress) as advance,
            contextlib.closing(results),
        ):
            for report in results:
                reports.append(report)
                advance(report.job.file["records"])
    reports.sort(key=lambda report: report.job.first)
    hashes = np.frombuffer(b"".join(r.id_hashes for r in reports), np.uint64)
    duplicates, examples = _duplicates(hashes)
    duplicate_ids: list[str] = []
    if examples:
        dataset = Dataset(directory, manifest, Index.open(directory))
        duplicate_ids = [dataset[i].id for i in examples]
    return Report(
        files=len(manifest["shards"]) + len(manifest["index"]),
        records=sum(r.job.file["records"] for r in reports),
        images=sum(r.images for r in reports),
        problems=problems + [problem for report in reports for problem in report.problems],
        duplicates=duplicates,
        duplicate_ids=duplicate_ids,
    )


def _file_problem(directory: Path, file: Mapping[str, Any]) -> Problem | None:
    """Are a file's bytes those of its entry in the manifest?

    Raises:
      OSError: when it is missing or cannot be read.
      ValueError: when it is of another size.
    """
    check_size(directory, file)
    if describe_file(directory, file["file"])["sha256"] != file["sha256"]:
        return Problem(file["file"], "", "file", "its sha256 differs from the manifest's")
    return None


def _unreadable(file: Mapping[str, Any], error: Exception) -> Problem:
    return Problem(file["file"], "", "file", f"it cannot be read: {error}")


def _index_problems(directory: Path, manifest: Mapping[str, Any]) -> Iterator[Problem]:
    sound = True
    for file in manifest["index"]:
        try:
            problem = _file_problem(directory, file)
        except (OSError, ValueError) as error:
            problem = _unreadable(file, error)
        if problem:
            sound = False
            yield problem
    if sound:
        index, records, images = Index.open(directory), manifest["records"], manifest["images"]
        lengths = {f.name: len(getattr(index, f.name)) for f in dataclasses.fields(index)}
        wanted = dict.fromkeys(lengths, records) | {"image_offsets": records + 1, "image_sizes": images}
        offsets = index.image_offsets
        if lengths != wanted or offsets[0] != 0 or offsets[-1] != images or np.any(offsets[1:] < offsets[:-1]):
            yield Problem("index", "", "index", "its columns are not as long as the manifest and each other say")
    if sum(s["records"] for s in manifest["shards"]) != manifest["records"]:
        yield Problem("manifest.json", "", "file", "its shards do not add up to its records")


def _duplicates(hashes: np.ndarray) -> tuple[int, list[int]]:
    """How many of these occurred before, and where the first few of them are."""
    order = np.argsort(hashes, kind="stable")
    again = order[1:][(hashes[order][1:] == hashes[order][:-1]) & (hashes[order][1:] != 0)]
    return len(again), sorted(again.tolist())[:_NAMED]


def _check_shard(
    directory: Path, processor: Processor | None, decode: bool, job: _Job, stopped: Stopped
) -> _ShardReport:
    problems: list[Problem] = []
    name, shard = job.file["file"], Shard(directory / job.file["file"], job.file["records"])
    hashes = np.zeros(shard.records, np.uint64)
    images = 0
    index = Index.open(directory)  # mapped: no index travels to the workers
    try:
        if problem := _file_problem(directory, job.file):
            problems.append(problem)
        reader = open_shard(shard)
    except (OSError, ValueError) as error:
        problems.append(_unreadable(job.file, error))
        return _ShardReport(job, 0, problems, hashes.tobytes())
    for i in range(shard.records):
        if stopped():
            raise Stop
        number, record_id, reason = job.first + i, "", "unreadable"
        try:
            record = Record.from_bytes(read_record(reader, shard, i))
            record_id, reason = record.id, "index"
            digest = hashlib.blake2b(record.id.encode(), digest_size=8).digest()
            hashes[i] = max(1, int.from_bytes(digest, "little"))
            images += len(record.images)
            _compare(record, index, number, processor, decode)
        except BadRecord as bad:
            reason, detail = bad.reason, str(bad)
        except Exception as error:  # Of bytes that are not what was written, anything.
            detail = f"{error}" or type(error).__name__
        else:
            continue
        problems.append(Problem(f"{name}, record {number} of the dataset", record_id, reason, detail))
    return _ShardReport(job, images, problems, hashes.tobytes())


def _compare(record: Record, index: Index, i: int, processor: Processor | None, decode: bool) -> None:
    """A record as its row of the index says, or a ValueError; BadRecord when it could not be imported today."""
    now: dict[str, Any] = {"mode": mode_of(record), "task": record.task}
    then: dict[str, Any] = {"mode": MODES[index.modes[i]], "task": TASKS[index.tasks[i]]}
    if processor is None:
        now["image sizes"] = list(measure_images(record, decode=decode))
    else:
        measured = measure(record, processor, decode=decode)
        now |= {"image sizes": list(measured.image_sizes), "text tokens": measured.text_tokens}
        then["text tokens"] = int(index.text_tokens[i])
    then["image sizes"] = index.sizes_of(i)
    for name, value in now.items():
        if value != then[name]:
            raise ValueError(f"{name}: {value}, the index says {then[name]}")
