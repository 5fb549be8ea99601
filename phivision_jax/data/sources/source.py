"""The protocol of sources: numbered items (``io.work.Source``), each of them a record or the reason why it is none."""

from __future__ import annotations

import dataclasses
from typing import Literal

from phivision_jax.data.quarantine import Quarantined
from phivision_jax.data.records import Record
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


type Source = work.Source[Read | Quarantined]
"""Numbered items of one data set: one result for each. ``Source.name`` is the default of ``Record.source``."""
