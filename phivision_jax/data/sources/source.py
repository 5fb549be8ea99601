"""The protocol of sources: numbered items, each of which gives a record or the reason why it is none.

An import cuts the numbers into chunks and reads these in worker processes. So a source can be pickled, opens files only
inside ``read``, and reads the same results in the same order every time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal, Protocol

from phivision_jax.data.quarantine import Quarantined
from phivision_jax.data.records import Record

ModeFrom = Literal["stated", "inferred", "default"]


@dataclasses.dataclass(frozen=True)
class Read:
    """A record as read, with what an import counts about it."""

    record: Record
    """With a mode, and images as bytes."""
    mode_from: ModeFrom
    """Whether the mode was stated, inferred from how the answers begin, or the default."""
    system: bool
    """Whether the conversation came with a system message, kept or not."""
    where: str = ""
    """The item's place for people: file and line, row or number."""


class Source(Protocol):
    """Numbered items of one data set."""

    name: str
    """Default of ``Record.source``."""

    def __len__(self) -> int:
        """Number of items."""
        ...

    def key(self) -> Any:
        """JSON value that changes with the content or the reading options; an import resumes only if it is the same.

        It holds names, sizes and modification times of the files; no content is hashed.
        """
        ...

    def read(self, start: int, stop: int) -> Iterator[Read | Quarantined]:
        """Items ``start`` … ``stop − 1``: exactly one result for each."""
        ...
