"""Records that are in memory already, read like those of any other format."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from phivision_jax.data.quarantine import Quarantined
from phivision_jax.data.records import Record
from phivision_jax.data.sources.items import ItemOptions, ItemReader
from phivision_jax.data.sources.source import Read


class RecordsSource:
    """Records of a program, whose images may be paths anywhere: they are read when asked for."""

    def __init__(self, records: Sequence[Record], name: str = "memory") -> None:
        self.name = name
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def key(self) -> Any:
        digest = hashlib.sha256()
        for record in self._records:
            digest.update(repr(record).encode("utf-8", "backslashreplace"))
        return {"format": "memory", "name": self.name, "records": digest.hexdigest()}

    def read(self, start: int, stop: int) -> Iterator[Read | Quarantined]:
        # The root of the file system: a program's paths are its own affair.
        reader = ItemReader(self.name, Path(Path.cwd().anchor), ItemOptions())
        for i, record in enumerate(self._records[start:stop], start):
            images = [str(Path(image).absolute()) if isinstance(image, str) else image for image in record.images]
            item = {
                "id": record.id,
                "source": record.source,
                "images": images,
                "messages": list(record.messages),
                "mode": record.mode,
                "task": record.task,
                "metadata": dict(record.metadata),
            }
            yield reader.read(item, f"{self.name}:{i + 1}", f"record {i + 1} of {self.name}")
