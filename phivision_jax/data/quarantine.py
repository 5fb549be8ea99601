"""Bad input: named once, with its reason, in a file; never dropped in silence, never the end of a run by itself.

    {"id": "photo/17", "source": "photos", "reason": "image-broken", "detail": "image 0 cannot be decoded: …",
     "where": "photos.jsonl, line 18"}

What shows at import (unreadable lines, missing files, broken headers) goes to ``quarantine.jsonl`` of the dataset and
is not in it. What shows only when pixels are decoded leaves a hole in its row and goes to ``quarantine.jsonl`` of the
run. Both stop with a summary once more than a stated share is bad: then it is the data set that is wrong.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, get_args

Reason = Literal[
    "unreadable",  # of a dataset, not of a source: bytes on disk that are not what was written
    "syntax",  # not JSON, not a row: nothing can be read
    "encoding",  # broken UTF-8, a lone surrogate
    "fields",  # a field is missing or of the wrong kind
    "role",  # a role that is not system, user or assistant
    "empty-answer",  # no assistant message, or one that says nothing
    "control-token",  # content that would be obeyed, not read
    "mode",  # an answer that is not of the stated mode
    "too-long",  # more tokens than the model has positions
    "coordinates",  # a box or a point outside its image
    "image-count",  # as many <image> as images: not so
    "image-missing",  # no such file
    "image-path",  # a path that leaves the image folder
    "image-url",  # a URL that may not be, or cannot be, fetched
    "image-extension",  # a name that says another format than the content
    "image-size",  # a decompression bomb, or a strip longer than MAX_SIDE
    "image-broken",  # cannot be decoded
]
REASONS: tuple[str, ...] = get_args(Reason)
MAX_SHARE = 0.01
"""The share of bad records that stops an import or a training, by default."""
FILE = "quarantine.jsonl"


_log = logging.getLogger(__name__)


class BadRecord(ValueError):
    """This record cannot be used, for ``reason``; the message says the rest."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason: Reason = reason


@dataclasses.dataclass(frozen=True)
class Quarantined:
    """One line of the file."""

    id: str
    """The record's own, or its place ("data.jsonl:18") where none can be read."""
    source: str
    reason: Reason
    detail: str
    where: str
    """For a person: file and line, row or number."""

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)


def file_of_process(number: int) -> str:
    """Each host of a run names what it met itself: quarantine.jsonl, quarantine-1.jsonl, …"""
    return FILE if number == 0 else f"quarantine-{number}.jsonl"


class TooManyBadRecords(ValueError):
    """More than the stated share is bad."""


class Tally:
    """How many records are bad, by reason, and the first of each."""

    def __init__(self) -> None:
        self._counts: collections.Counter[str] = collections.Counter()
        self._first: dict[str, Quarantined] = {}

    def add(self, bad: Quarantined) -> None:
        self._counts[bad.reason] += 1
        self._first.setdefault(bad.reason, bad)

    def check(self, total: int, max_share: float, file: Path) -> None:
        """Stop when more than ``max_share`` of ``total`` records is bad.

        Raises:
          TooManyBadRecords: with a summary by reason and an example of each, and where all are named.
        """
        if (count := self._counts.total()) <= max_share * total:
            return
        lines = [
            f"  {n:>9,} {reason:<16} e.g. {self._first[reason].id!r}: {self._first[reason].detail}"
            for reason, n in self._counts.most_common()
        ]
        raise TooManyBadRecords(
            f"{count:,} of {total:,} records are bad, more than the {max_share:.2%} that are let pass; "
            f"{file} names each:\n" + "\n".join(lines)
        )


class RunLog:
    """``quarantine.jsonl`` of a run: each record that left a hole, named once however often it is met.

    Args:
      file: appended to; what it names already is not named again.
      max_share: of the examples since this process began, at least ``_FIRST_CHECK``, may be bad.
    """

    _FIRST_CHECK = 1_000
    _LOGGED = 10

    def __init__(self, file: Path, max_share: float) -> None:
        self.file, self.max_share = file, max_share
        self.holes = 0
        """All of them since this process began, repeated ones too."""
        self._seen = 0
        self._tally = Tally()
        self._named: set[tuple[str, str]] = set()
        if file.is_file():
            content = file.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if whole != content:  # a kill cut the last line short
                file.write_bytes(whole)
            for bad in map(json.loads, whole.splitlines()):
                self._named.add((bad["id"], bad["where"]))

    def add(self, holes: Iterable[Quarantined], examples: int) -> None:
        """Of ``examples`` more examples, these left holes.

        Raises:
          TooManyBadRecords: once they are more than the share.
        """
        self._seen += examples
        for hole in holes:
            self.holes += 1
            self._tally.add(hole)
            if (hole.id, hole.where) not in self._named:
                self._named.add((hole.id, hole.where))
                with self.file.open("a", encoding="utf-8") as file:
                    file.write(hole.to_json() + "\n")
                if len(self._named) <= self._LOGGED:
                    _log.warning(
                        "record %r of %r leaves a hole (%s): %s", hole.id, hole.source, hole.reason, hole.detail
                    )
                if len(self._named) == self._LOGGED:
                    _log.warning("further holes are named in %s alone", self.file)
        self._tally.check(max(self._seen, self._FIRST_CHECK), self.max_share, self.file)


def check_share(bad: Iterable[Quarantined], total: int, max_share: float, file: Path) -> None:
    """Stop when more than ``max_share`` of ``total`` records is bad, see ``Tally.check``."""
    tally = Tally()
    for quarantined in bad:
        tally.add(quarantined)
    tally.check(total, max_share, file)
