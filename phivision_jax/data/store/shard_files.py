"""Reading ArrayRecord files at random: however many a process's datasets have, few are open at a time.

Of 60 million records there are thousands of files, and a process may often open no more than 1,024. The readers last
used stay open, those of all datasets together; reading goes on while others come and go.
"""

from __future__ import annotations

import collections
import dataclasses
import errno
import os
import re
import resource
import threading
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordReader

MOST_OPEN = 256
"""Files that stay open, or half as many as the process may open where that is fewer."""
# One record is wanted, not its neighbours, and in the thread that asks: there are enough of them.
_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_BUFFER_BYTES = 32_768
_ERRNO = {os.strerror(number): number for number in errno.errorcode}


@dataclasses.dataclass(frozen=True, eq=False)
class Shard:
    """A file and the number of its records. Only itself is equal to it: a file may be made anew under its name."""

    path: Path
    records: int


class Readers:
    """The readers of at most ``most`` shards, those last used. Safe to use from several threads.

    A reader that makes room is only forgotten: its file is closed with the last reference to it, so none is closed
    under another thread.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._open: collections.OrderedDict[Shard, ArrayRecordReader] = collections.OrderedDict()
        self._lock = threading.Lock()

    def read(self, shard: Shard, position: int) -> bytes:
        """A record's payload, by its number in the shard.

        Raises:
          OSError: when the file cannot be opened or read; it is opened again the next time.
          ValueError: for bytes that are not what was written.
        """
        with self._lock:
            reader = self._open.get(shard)
            if reader is not None:
                self._open.move_to_end(shard)
        if reader is None:
            # Not under the lock: on network storage others need not wait for it. Two may do it, one reader stays.
            opened = open_shard(shard)
            with self._lock:
                reader = self._open.setdefault(shard, opened)
                self._open.move_to_end(shard)
                while len(self._open) > self._most:
                    self._open.popitem(last=False)
        try:
            return read_record(reader, shard, position)
        except (OSError, ValueError):
            with self._lock:
                self._open.pop(shard, None)
            raise


def open_shard(shard: Shard) -> ArrayRecordReader:
    """A reader of a file that says itself that it holds the shard's records; raises as ``Readers.read`` does."""
    reader = ArrayRecordReader(str(shard.path), _OPTIONS, file_reader_buffer_size=_BUFFER_BYTES)
    if not reader.ok():  # Why is said only when it is asked for a record.
        read_record(reader, shard, 0)
    if reader.num_records() != shard.records:
        raise ValueError(f"it holds {reader.num_records():,} records, the manifest says {shard.records:,}")
    return reader


def read_record(reader: ArrayRecordReader, shard: Shard, position: int) -> bytes:
    """One payload; raises as ``Readers.read`` does."""
    try:
        (payload,) = reader.read([position])
        return payload
    except RuntimeError as error:
        # "open() failed: No such file or directory; opening …" is the system's; all else is about the content.
        if system := re.search(r"\w\(\) failed: ([^;]+)", str(error)):
            raise OSError(_ERRNO.get(system[1], errno.EIO), system[1], str(shard.path)) from None
        raise ValueError(str(error)) from None


def _most_open() -> int:
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_OPEN if allowed == resource.RLIM_INFINITY else max(1, min(MOST_OPEN, allowed // 2))


READERS = Readers(_most_open())
"""The process's."""
