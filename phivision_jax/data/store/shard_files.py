"""Random access to ArrayRecord files, of which only a few are open at a time, whatever the number of datasets.

60 million records are thousands of files, and a process may often open no more than 1,024. The readers used last stay
open, those of all datasets together.
"""

import dataclasses
import errno
import functools
import os
import re
import resource
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordReader

MOST_OPEN = 256
"""Files that stay open, or half as many as the process may open if that is fewer."""
# One record is wanted, not its neighbours, and in the calling thread: there are enough threads.
_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_BUFFER_BYTES = 32_768
_ERRNO = {os.strerror(number): number for number in errno.errorcode}


@dataclasses.dataclass(frozen=True, eq=False)
class Shard:
    """A file and its number of records. Compared by identity: a file may be replaced under its name."""

    path: Path
    records: int


class Readers:
    """Readers of the ``most`` shards used last. Safe to use from several threads.

    A reader that makes room is only forgotten: its file closes with the last reference, never under another thread.
    """

    def __init__(self, most: int) -> None:
        self._open = functools.lru_cache(most)(lambda shard: open_shard(shard))

    def read(self, shard: Shard, position: int) -> bytes:
        """A record's payload, by its number in the shard.

        Raises:
          OSError: when the file cannot be opened or read; the next call opens it again.
          ValueError: for bytes that are not what was written.
        """
        try:
            return read_record(self._open(shard), shard, position)
        except (OSError, ValueError):
            # On network storage an error may stay with a handle after the storage has come back.
            self._open.cache_clear()
            raise


def open_shard(shard: Shard) -> ArrayRecordReader:
    """A reader of a file that has the expected number of records; raises as ``Readers.read`` does."""
    reader = ArrayRecordReader(str(shard.path), _OPTIONS, file_reader_buffer_size=_BUFFER_BYTES)
    if not reader.ok():  # only reading a record reports the reason
        read_record(reader, shard, 0)
    if reader.num_records() != shard.records:
        raise ValueError(f"it has {reader.num_records():,} records, the manifest {shard.records:,}")
    return reader


def read_record(reader: ArrayRecordReader, shard: Shard, position: int) -> bytes:
    """One payload; raises as ``Readers.read`` does."""
    try:
        (payload,) = reader.read([position])
        return payload
    except RuntimeError as error:
        # "open() failed: No such file or directory; opening …" is the system's, everything else about the content.
        if system := re.search(r"\w\(\) failed: ([^;]+)", str(error)):
            raise OSError(_ERRNO.get(system[1], errno.EIO), system[1], str(shard.path)) from None
        raise ValueError(str(error)) from None


_allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
READERS = Readers(MOST_OPEN if _allowed == resource.RLIM_INFINITY else max(1, min(MOST_OPEN, _allowed // 2)))
"""The readers of this process."""
