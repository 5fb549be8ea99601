"""Datasets of records that a test has in memory."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from phivision_jax.data.records import Record
from phivision_jax.data.sources.source import RecordsSource
from phivision_jax.data.store.dataset import Dataset
from phivision_jax.data.store.importing import SHARD_BYTES, import_source
from phivision_jax.processor import Processor


def write_dataset(
    directory: str | os.PathLike[str],
    records: Iterable[Record],
    processor: Processor,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> Dataset:
    """Import records in this process, as one chunk; none may be bad."""
    source = RecordsSource(list(records))
    options: dict[str, Any] = {"workers": 0, "chunk": max(1, len(source)), "max_bad": 0.0, "progress": False}
    return import_source(source, directory, processor, shard_bytes=shard_bytes, **options)
