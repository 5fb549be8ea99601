"""Random access to more files than a process may open, from many threads, with few of them open."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from phivision_jax.data.store import shard_files
from phivision_jax.data.store.shard_files import Readers, Shard, read_record
from tests.support.datasets import write_dataset
from tests.support.records import make_record

N = 300

READ = """
import random, resource, sys
from concurrent.futures import ThreadPoolExecutor
resource.setrlimit(resource.RLIMIT_NOFILE, (128, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
from phivision_jax.data.store.dataset import Dataset

datasets = [Dataset.open(sys.argv[1]) for _ in range(2)]  # a mixture: each opens files of its own
assert len(datasets[0].manifest["shards"]) > 128
def read(i):
    return datasets[i % 2][i // 2].id == f"r{i // 2:03d}"
with ThreadPoolExecutor(8) as pool:
    assert all(pool.map(read, random.Random(0).choices(range(2 * len(datasets[0])), k=2_000)))
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory, processor) -> Path:
    """A record per shard."""
    records = [make_record(i, ()) for i in range(N)]
    out = tmp_path_factory.mktemp("many") / "set"
    return write_dataset(out, records, processor, shard_bytes=1).directory


def test_dataset_with_more_files_than_may_be_open(directory):
    done = subprocess.run([sys.executable, "-c", READ, str(directory)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks for open files in /proc")
def test_readers_keep_last_used_open(directory):
    def is_open() -> list[str]:
        links = (os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd"))
        return sorted(Path(link).name for link in links if Path(link).parent == directory.resolve())

    files = [Shard(path, 1) for path in sorted(directory.glob("*.array_record"))[:5]]
    before, readers = is_open(), Readers(3)
    for k in (0, 1, 2, 0, 3, 4):
        readers.read(files[k], 0)
    assert sorted(is_open()) == sorted([*before, *(files[k].path.name for k in (0, 3, 4))])
    del readers
    assert is_open() == before


def test_readers_are_safe_in_threads(directory):
    files = [Shard(path, 1) for path in sorted(directory.glob("*.array_record"))[:6]]
    readers, alone = Readers(1), [Readers(1).read(shard, 0) for shard in files]
    wrong: list[object] = []

    def read(seed: int) -> None:
        order = random.Random(seed)
        try:
            for _ in range(300):
                k = order.randrange(len(files))
                if readers.read(files[k], 0) != alone[k]:
                    wrong.append(k)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize(
    "message, error, number",
    [
        ("pread() failed: Input/output error; reading a; at byte 7", OSError, 5),
        ("open() failed: Too many open files; opening a", OSError, 24),
        ("open() failed: Permission denied; opening a", PermissionError, 13),
        ("read() failed: an unknown message; reading a", OSError, 5),
        ("Corrupted Riegeli/records file: chunk data hash mismatch; at byte 7", ValueError, None),
        ("index 3 out of bound 3", ValueError, None),
    ],
)
def test_read_record_distinguishes_system_errors(tmp_path, message, error, number):
    class Reader:
        def read(self, positions: list[int]) -> list[bytes]:
            raise RuntimeError(message)

    with pytest.raises(error) as raised:
        read_record(Reader(), Shard(tmp_path / "a", 1), 0)
    assert getattr(raised.value, "errno", None) == number
    assert number is None or raised.value.filename == str(tmp_path / "a")


def test_readers_reopen_after_error(directory, monkeypatch):
    """On network storage an error may stay with a handle after the storage has come back."""
    shard, readers = Shard(next(directory.glob("*.array_record")), 1), Readers(2)
    payload, opened, read = readers.read(shard, 0), [], shard_files.read_record
    open_shard = shard_files.open_shard
    monkeypatch.setattr(shard_files, "open_shard", lambda s: opened.append(s) or open_shard(s))

    def failing(*args):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(shard_files, "read_record", failing)
    with pytest.raises(OSError, match="Input/output"):
        readers.read(shard, 0)
    monkeypatch.setattr(shard_files, "read_record", read)
    assert opened == [] and readers.read(shard, 0) == payload and opened == [shard]
