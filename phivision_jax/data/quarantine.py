"""Bad input: each item is listed once, with its reason, in a file; none is dropped silently, none stops a run.

    {"id": "photo/17", "source": "photos", "reason": "image-broken", "detail": "image 0 cannot be decoded: …",
     "where": "photos.jsonl, line 18"}

What an import finds (unreadable lines, missing files, broken headers) is listed in ``quarantine.jsonl`` of the dataset
and is not part of it. What only decoding finds leaves a placeholder in its row of the batch and is listed in
``quarantine.jsonl`` of the run. Both stop with a summary when the share of bad items is too large: then the data set is
at fault.

The reasons of reading and importing; any other step that rejects items has reasons of its own, written "step/reason"
("dedup/near-duplicate"):

    unreadable       bytes of a dataset that are no longer what was written
    syntax           not JSON, not a row: nothing can be read
    encoding         broken UTF-8, a lone surrogate
    fields           a field is missing or has the wrong type
    unread           a field, marker or part with a meaning that is not supported, which names it and the remedy
    role             a role other than system, user and assistant
    empty-answer     no assistant message, or one without text
    control-token    content with a control token, which the model would obey
    mode             an answer that does not fit the stated mode
    too-long         more tokens than the model has positions
    coordinates      a box or a point outside its image
    image-count      the number of <image> markers is not the number of images
    image-missing    no such file
    image-path       a path that leaves the image folder
    image-url        a URL that is not allowed or cannot be fetched
    image-size       a file, a record's images or decoded pixels of too many bytes, or a side longer than MAX_SIDE
    image-broken     cannot be decoded
    failed           it needs too much memory, or its reader or the tokenizer fails unexpectedly
"""

from __future__ import annotations

import collections
import dataclasses
import json
import logging
from collections.abc import Iterable
from pathlib import Path

from phivision_jax.io import jsonl
from phivision_jax.io.messages import first_line, shorten
from phivision_jax.text.chat import UnmarkedTemplateError

MAX_SHARE = 0.01
"""Default share of bad records that stops an import or a training run."""
FILE = "quarantine.jsonl"
LONGEST = 1_000
"""Characters of a detail; a value in it has about 100."""

_log = logging.getLogger(__name__)


class BadRecord(ValueError):
    """A record that cannot be used; ``reason`` is in the table above or "step/reason", the message is the detail."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(shorten(detail, LONGEST))
        self.reason = reason


def describe_failure(error: BaseException) -> str:
    """The detail of an item on which foreign code failed; an error that is not the item's fault is raised again.

    Extensions raise anything: a panic of Rust code is not even an ``Exception``.
    """
    is_of_disk = isinstance(error, OSError) and error.errno is not None
    of_program = KeyboardInterrupt | SystemExit | GeneratorExit | UnmarkedTemplateError
    if is_of_disk or isinstance(error, of_program):
        raise error
    if isinstance(error, MemoryError):
        return "it cannot be decoded within the limit on memory"
    return f"reading it fails: {type(error).__name__}: {shorten(first_line(error))}"


@dataclasses.dataclass(frozen=True)
class Quarantined:
    """One line of the file."""

    id: str
    """The record's own id, or its place ("data.jsonl:18") if it has none that can be read."""
    source: str
    reason: str
    detail: str
    where: str
    """The item's place for people: file and line, row or number."""

    def __post_init__(self) -> None:
        for name, limit in (("id", 100), ("source", 100), ("detail", LONGEST), ("where", 400)):
            object.__setattr__(self, name, shorten(getattr(self, name), limit))

    def to_line(self) -> bytes:
        """JSON and a line break."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False).encode() + b"\n"


def read_quarantine(file: Path) -> list[dict[str, str]]:
    """The complete lines of a file."""
    return jsonl.read(file, **{field.name: str for field in dataclasses.fields(Quarantined)})


def file_of_process(number: int) -> str:
    """Name of the file of one host of a run: quarantine.jsonl, quarantine-1.jsonl, …"""
    return FILE if number == 0 else f"quarantine-{number}.jsonl"


class TooManyBadRecords(ValueError):
    """The share of bad records is larger than allowed."""

    @classmethod
    def summarise(cls, count: int, total: int, max_share: float, file: Path) -> TooManyBadRecords:
        """The error for ``count`` bad records, with the number of each reason in ``file`` and an example."""
        rows = read_quarantine(file)
        examples = {row["reason"]: f"{row['id']!r}: {row['detail']}" for row in reversed(rows)}
        counts = collections.Counter(row["reason"] for row in rows).most_common()
        head = f"{count:,} of {total:,} records are bad, more than the {max_share:.2%} of max_bad; {file} lists them:"
        return cls("\n".join([head, *(f"  {n:>9,} {reason:<16} e.g. {examples[reason]}" for reason, n in counts)]))


class RunLog:
    """``quarantine.jsonl`` of a run: each record that failed in training, listed once over epochs and restarts.

    Args:
      file: appended to.
      max_share: largest share of failed examples since this process started, out of at least ``_FIRST_CHECK``.
    """

    _FIRST_CHECK = 1_000
    _LOGGED = 10

    def __init__(self, file: Path, max_share: float) -> None:
        self.file, self.max_share = file, max_share
        self.failed = 0
        """Failed examples since this process started, repeated ones included."""
        self._seen = 0
        self._listed = {(row["id"], row["where"]) for row in read_quarantine(file)}

    def add(self, failed: Iterable[Quarantined], examples: int) -> None:
        """Count ``examples`` more examples, of which these failed.

        Raises:
          TooManyBadRecords: when the share is too large.
        """
        self._seen += examples
        for bad in failed:
            self.failed += 1
            if (bad.id, bad.where) in self._listed:
                continue
            self._listed.add((bad.id, bad.where))
            jsonl.append(self.file, dataclasses.asdict(bad))
            if len(self._listed) <= self._LOGGED:
                _log.warning("record %r of %r failed (%s): %s", bad.id, bad.source, bad.reason, bad.detail)
            if len(self._listed) == self._LOGGED:
                _log.warning("further failed records are only listed in %s", self.file)
        total = max(self._seen, self._FIRST_CHECK)
        if self.failed > self.max_share * total:
            raise TooManyBadRecords.summarise(self.failed, total, self.max_share, self.file)
