"""The protocol of sources: numbered items (``io.work.Source``), each of them a record or the reason why it is none.

``RecordsSource`` has records that are in memory already.
"""

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from phivision_jax.data.quarantine import BadRecord, Quarantined
from phivision_jax.data.records import Record
from phivision_jax.data.sources.fetch import fetch
from phivision_jax.data.sources.item_options import ItemOptions
from phivision_jax.io import work

ModeFrom = Literal["stated", "inferred", "default"]


@dataclasses.dataclass(frozen=True)
class Read:
    """A record as read, with what an import counts about it."""

    record: Record
    """With images as bytes."""
    mode_from: ModeFrom
    """Origin of the mode: stated, inferred from how the answers begin, or the default."""
    system: bool
    """The conversation came with a system message, kept or not."""
    where: str
    """The item's place for people: file and line, row or number."""
    unread: tuple[tuple[str, Any], ...] = ()
    """Names and values of keys that are neither understood nor known to be harmless."""


type Source = work.Source[Read | Quarantined]
"""Numbered items of one data set: one result for each. ``Source.name`` is the default of ``Record.source``."""


class RecordsSource:
    """Records as they are; images given as paths, anywhere on this machine, are read on demand."""

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
        root, options = Path("/"), ItemOptions()
        for i, record in enumerate(self._records[start:stop], start):
            where = f"record {i + 1} of {self.name}"
            try:
                given = (os.path.abspath(image) if isinstance(image, str) else image for image in record.images)
                images = tuple(fetch(image, root, options) for image in given)
            except BadRecord as bad:
                yield Quarantined(record.id, record.source, bad.reason, str(bad), where)
                continue
            system = any(message.get("role") == "system" for message in record.messages)
            mode_from: ModeFrom = "stated" if record.mode else "inferred"
            yield Read(dataclasses.replace(record, images=images), mode_from, system, where)
