"""Imports: the same bytes after any interruption, each bad item listed once, no incomplete dataset under its name."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from phivision_jax.data.quarantine import TooManyBadRecords
from phivision_jax.data.sources.source import RecordsSource
from phivision_jax.data.store.dataset import MANIFEST, SCHEMA, Dataset
from phivision_jax.data.store.importing import import_source
from phivision_jax.data.store.integrity import validate
from phivision_jax.io import atomic, retry, work
from phivision_jax.io.work import CHUNKS, KEY, WORK
from phivision_jax.processor import Processor
from phivision_jax.text.chat import UnmarkedTemplateError
from phivision_jax.text.template import ChatTemplate
from tests.support.datasets import write_dataset
from tests.support.generated_source import KINDS, MadeUpSource
from tests.support.paths import ROOT
from tests.support.records import CONFIG, make_record, png

N, CHUNK = 60, 8
BAD = {"unreadable": (3, 17, 59), "silent": (4, 40)}
SMALL = {"chunk": CHUNK, "shard_bytes": 20_000, "max_bad": 0.2, "progress": False}


def content(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, processor) -> Dataset:
    return import_source(
        MadeUpSource(N, **BAD), tmp_path_factory.mktemp("whole") / "set", processor, workers=0, **SMALL
    )


def test_import_keeps_good_and_lists_bad_items(undisturbed, processor):
    good = [i for i in range(N) if i not in BAD["unreadable"] + BAD["silent"]]
    assert [undisturbed[i].id for i in range(len(undisturbed))] == [f"r{i:03d}" for i in good]
    assert [undisturbed[i] for i in range(len(undisturbed))] == [make_record(i, KINDS[i % 6]) for i in good]
    assert undisturbed[3].lineage == ("import: set, line 6",)
    assert undisturbed.index.num_images.tolist() == [len(KINDS[i % 6]) for i in good]
    assert undisturbed.index.image_sizes.tolist() == [list(size) for i in good for size in KINDS[i % 6]]
    lines = (undisturbed.directory / "quarantine.jsonl").read_bytes().splitlines()
    bad = [json.loads(line) for line in lines]
    assert [(b["id"], b["reason"], b["where"]) for b in bad] == [
        ("set:4", "syntax", "set, line 4"),
        ("r004", "empty-answer", "set, line 5"),
        ("set:18", "syntax", "set, line 18"),
        ("r040", "empty-answer", "set, line 41"),
        ("set:60", "syntax", "set, line 60"),
    ]
    assert bad[0]["detail"] == r"not JSON: \udc80"
    manifest = undisturbed.manifest
    assert manifest["counts"] == {
        "modes": {"nothink": 55},
        "mode_from": {name: sum(i % 3 == k for i in good) for k, name in enumerate(("stated", "inferred", "default"))},
        "tasks": {"general": 55},
        "sources": {"made-up": 55},
        "quarantined": {"empty-answer": 2, "syntax": 3},
        "system_messages": sum(i % 5 == 0 for i in good),
        "unread": {},
    }
    assert (manifest["records"], manifest["images"]) == (55, len(undisturbed.index.image_sizes))
    assert (
        manifest["text_tokens"] == undisturbed.index.text_tokens.sum()
        and manifest["text"] == processor.text_fingerprint
    )
    assert validate(undisturbed.directory, workers=0, progress=False).problems == []
    assert len(manifest["shards"]) > -(-N // CHUNK)
    assert {p.name for p in undisturbed.directory.iterdir()} == {
        KEY, MANIFEST, "index", "quarantine.jsonl", *(s["file"] for s in manifest["shards"])
    }  # fmt: skip


@pytest.mark.parametrize("workers", [1, 2])
def test_import_same_bytes_with_workers(undisturbed, tmp_path, processor, workers):
    again = import_source(MadeUpSource(N, **BAD), tmp_path / "set", processor, workers=workers, **SMALL)
    assert content(again.directory) == content(undisturbed.directory)


def test_import_chunk_length_keeps_records(undisturbed, tmp_path, processor):
    one = import_source(MadeUpSource(N, **BAD), tmp_path / "set", processor, workers=0, max_bad=0.2, progress=False)
    assert len(one.manifest["shards"]) == 1 and one.hash != undisturbed.hash
    assert [one[i] for i in range(len(one))] == [undisturbed[i] for i in range(len(undisturbed))]
    assert content(one.directory)["quarantine.jsonl"] == content(undisturbed.directory)["quarantine.jsonl"]


@pytest.mark.parametrize(
    "items, chunk",
    [(1, 2048), (2048, 2048), (8_388_608, 2048), (8_388_609, 4096), (60_000_000, 16_384), (10**9, 245_760)],
)
def test_default_chunk_grows_with_items(items, chunk):
    """The end of a chunk closes its shard: with 2,048 items each, 60 million would be 29,297 files of any size."""
    assert work.default_chunk(items) == chunk and -(-items // chunk) <= 4096


def test_import_large_set_has_few_files(tmp_path, processor, monkeypatch):
    monkeypatch.setattr(work, "CHUNK", 4)
    monkeypatch.setattr(work, "MOST_CHUNKS", 3)
    dataset = import_source(MadeUpSource(N), tmp_path / "set", processor, workers=0, progress=False)
    assert json.loads((dataset.directory / KEY).read_text())["chunk"] == 20 and len(dataset.manifest["shards"]) == 3
    assert [dataset[i] for i in range(N)] == [make_record(i, KINDS[i % 6]) for i in range(N)]


def test_changes_lists_first_differences():
    then, now = ({"files": [[f"{k}.jsonl", k, time] for k in range(20)]} for time in (1, 2))
    lines = work._changes(then, now).split("\n  ")
    assert lines[1] == "files.0.2: 1, now 2" and lines[-1] == "and 10 more" and len(lines) == 12
    files = {"/set/a.b.json": "130,160 bytes; 1", "/b": "3 bytes; 1", "/c": "3 bytes; 1"}
    later = {"/set/a.b.json": "111,608 bytes; 2", "/b": "3 bytes; 2", "/d": "3 bytes; 1"}
    before, after = ({"source": {"files": one}} for one in (files, later))
    assert work._changes(before, after).split("\n  ")[1:] == [
        "a.b.json has changed (130,160 bytes → 111,608 bytes)",
        "b has changed (3 bytes → 3 bytes)",
        "c has changed (3 bytes → absent)",
        "d has changed (absent → 3 bytes)",
    ]
    assert len(work._changes({"a": "x" * 10**6}, {"a": "y"})) < 150
    assert work._changes({"a": {"b": None}}, {"a": {"b": ["x"]}}) == '\n  a.b: null, now ["x"]'
    assert work._changes({"a": [1]}, {"a": [1, 2], "b": 3}) == "\n  a: [1], now [1, 2]\n  b: null, now 3"


def test_write_dataset_text_only_think(tmp_path, processor):
    messages = ({"role": "user", "content": "1+1"}, {"role": "assistant", "content": "<think>easy</think>2"})
    dataset = write_dataset(tmp_path / "set", [make_record(0, (), mode=None, messages=messages)], processor)
    assert dataset[0].mode == "think" and dataset.index.modes.tolist() == [0]
    assert dataset.index.image_sizes.shape == (0, 2)


class TestResume:
    @pytest.mark.parametrize("workers", [0, 2])
    def test_resume_after_error(self, undisturbed, tmp_path, processor, workers, capsys):
        source = MadeUpSource(N, **BAD, mishap="bug", item=30, once=tmp_path / "happened")
        with pytest.raises(KeyError):
            import_source(source, tmp_path / "set", processor, workers=workers, **SMALL)
        partial = tmp_path / ".set.partial"
        assert not (tmp_path / "set").exists() and list((partial / WORK).iterdir()) == []
        finished = {p.name for p in (partial / CHUNKS).iterdir()}
        assert finished and "00003.msgpack" not in finished
        again = import_source(source, tmp_path / "set", processor, workers=1, **{**SMALL, "progress": True})
        assert f"continuing: {len(finished)} of 8 chunks are complete" in capsys.readouterr().out
        assert content(again.directory) == content(undisturbed.directory)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["happened", "set"]

    def test_resume_skips_committed_chunks(self, tmp_path, processor, monkeypatch):
        source = MadeUpSource(N, mishap="bug", item=N - 1, once=tmp_path / "happened")
        with pytest.raises(KeyError):
            import_source(source, tmp_path / "set", processor, workers=0, **SMALL)
        asked = []
        read = MadeUpSource.read
        monkeypatch.setattr(MadeUpSource, "read", lambda self, a, b: asked.append((a, b)) or read(self, a, b))
        import_source(source, tmp_path / "set", processor, workers=0, **SMALL)
        assert asked == [(56, 60)]

    def test_resume_repeats_damaged_chunk(self, undisturbed, tmp_path, processor):
        source = MadeUpSource(N, **BAD, mishap="bug", item=N - 1, once=tmp_path / "happened")
        with pytest.raises(KeyError):
            import_source(source, tmp_path / "set", processor, workers=0, **SMALL)
        partial = tmp_path / ".set.partial"
        (partial / CHUNKS / "00000.msgpack").write_bytes(b"\x80")
        (partial / CHUNKS / "00001.msgpack").unlink()
        os.truncate(partial / "records-00002-000.array_record", 100)
        (partial / "records-00003-000.array_record").unlink()
        (partial / WORK / "00004-x").mkdir()
        (partial / "records-00004-900.array_record").write_bytes(b"left over")
        again = import_source(source, tmp_path / "set", processor, workers=0, **SMALL)
        assert content(again.directory) == content(undisturbed.directory)

    def test_resume_with_other_options_removes_nothing(self, undisturbed, tmp_path, processor):
        out, partial = tmp_path / "set", tmp_path / ".set.partial"
        stopped = MadeUpSource(N, **BAD, mishap="bug", item=50, once=tmp_path / "happened")
        with pytest.raises(KeyError):
            import_source(stopped, out, processor, workers=0, **SMALL)
        before = content(partial)
        assert len(list((partial / CHUNKS).iterdir())) == 6
        source = MadeUpSource(N - 1, **BAD)
        with pytest.raises(FileExistsError) as raised:
            import_source(source, out, processor, workers=0, decode=True, **SMALL)
        first, *lines = str(raised.value).splitlines()
        assert (
            str(partial) in first
            and "give --restart (restart=True) or remove the directory" in first
            and first.endswith("to continue it, restore these:")
        )
        assert lines == ["  source.n: 60, now 59", "  items: 60, now 59", "  decode: false, now true"]
        assert content(partial) == before and not hasattr(raised.value, "__notes__")
        # With its own options it continues; with --restart another starts.
        shutil.copytree(partial, tmp_path / ".other.partial")
        again = import_source(stopped, out, processor, workers=0, **SMALL)
        assert content(again.directory) == content(undisturbed.directory)
        other = import_source(source, tmp_path / "other", processor, workers=0, restart=True, **SMALL)
        assert len(other) == N - 1 - 4 and not (tmp_path / ".other.partial").exists()

    def test_restart_repeats_all_chunks(self, undisturbed, tmp_path, processor, monkeypatch):
        source = MadeUpSource(N, **BAD, mishap="bug", item=50, once=tmp_path / "happened")
        with pytest.raises(KeyError):
            import_source(source, tmp_path / "set", processor, workers=0, **SMALL)
        asked = []
        read = MadeUpSource.read
        monkeypatch.setattr(MadeUpSource, "read", lambda self, a, b: asked.append(a) or read(self, a, b))
        again = import_source(source, tmp_path / "set", processor, workers=0, restart=True, **SMALL)
        assert asked == list(range(0, N, CHUNK)) and content(again.directory) == content(undisturbed.directory)

    def test_other_options_replace_import_without_chunks(self, undisturbed, tmp_path, processor):
        with pytest.raises(KeyError):
            import_source(MadeUpSource(9, mishap="bug", item=0), tmp_path / "set", processor, workers=0, **SMALL)
        assert (tmp_path / ".set.partial" / KEY).exists()
        again = import_source(MadeUpSource(N, **BAD), tmp_path / "set", processor, workers=0, **SMALL)
        assert content(again.directory) == content(undisturbed.directory)

    def test_resume_refuses_other_schema(self, tmp_path, processor):
        with pytest.raises(KeyError):
            import_source(MadeUpSource(N, mishap="bug", item=50), tmp_path / "set", processor, workers=0, **SMALL)
        path = tmp_path / ".set.partial" / KEY
        path.write_text(json.dumps({**json.loads(path.read_text()), "schema": SCHEMA - 1}))
        with pytest.raises(FileExistsError, match="other data, options or program version") as raised:
            import_source(MadeUpSource(N), tmp_path / "set", processor, workers=0, **SMALL)
        assert f"\n  schema: {SCHEMA - 1}, now {SCHEMA}" in str(raised.value)

    @pytest.mark.parametrize("place", ["_remove_strays", "_remove_traces", "rename", "manifest"])
    def test_resume_after_kill_at_the_end(self, undisturbed, tmp_path, processor, monkeypatch, place):
        """Between the last chunk and the last clean-up, after each of the steps."""

        def killed(*args, **kwargs):
            raise SystemExit("killed")

        source, out = MadeUpSource(N, **BAD), tmp_path / "set"
        with monkeypatch.context() as patch:
            if place == "rename":
                patch.setattr(Path, "rename", killed)
            elif place == "manifest":
                write = atomic.write
                patch.setattr(atomic, "write", lambda path, c: killed() if path.name == MANIFEST else write(path, c))
            else:
                patch.setattr(work, place, killed)
            with pytest.raises(SystemExit):
                import_source(source, out, processor, workers=0, **SMALL)
        assert out.exists() == (place == "_remove_traces")
        again = import_source(source, out, processor, workers=0, **SMALL)
        assert content(again.directory) == content(undisturbed.directory)
        assert [p.name for p in tmp_path.iterdir()] == ["set"]

    def test_existing_directory_is_opened_or_left_alone(self, tmp_path, processor):
        first = import_source(MadeUpSource(9), tmp_path / "set", processor, workers=0, **SMALL)
        before = content(first.directory)
        assert import_source(MadeUpSource(9), tmp_path / "set", processor, workers=0, **SMALL).hash == first.hash
        with pytest.raises(FileExistsError, match=r"made from other data.*:\n  source.n: 9, now 10\n  items: 9"):
            import_source(MadeUpSource(10), tmp_path / "set", processor, workers=0, **SMALL)
        with pytest.raises(FileExistsError, match=r"remove it or choose another name:\n  decode: false, now true$"):
            import_source(MadeUpSource(9), tmp_path / "set", processor, workers=0, decode=True, **SMALL)
        assert content(first.directory) == before
        (tmp_path / "mine").mkdir()
        with pytest.raises(FileExistsError, match=r"work\.json does not exist; remove it"):
            import_source(MadeUpSource(9), tmp_path / "mine", processor, workers=0, **SMALL)
        assert not (tmp_path / ".mine.partial").exists()


class TestBadItems:
    def test_too_many_bad_items_stop_until_allowed(self, undisturbed, tmp_path, processor):
        source, out = MadeUpSource(N, **BAD), tmp_path / "set"
        options = {**SMALL, "max_bad": 2 / N}
        with pytest.raises(TooManyBadRecords, match=r"3 of 60 records are bad, more than the 3\.33%") as raised:
            import_source(source, out, processor, workers=0, **options)
        partial = tmp_path / ".set.partial"
        # The third bad item is in chunk 2 of 8.
        assert len(list((partial / CHUNKS).iterdir())) == 3
        assert str(partial / "quarantine.jsonl") in str(raised.value)
        assert len((partial / "quarantine.jsonl").read_bytes().splitlines()) == 3
        assert "max_bad" in str(raised.value) and "continues from there" in raised.value.__notes__[0]
        with pytest.raises(TooManyBadRecords):  # committed chunks count before anything is read
            import_source(source, out, processor, workers=0, **options)
        assert len(list((partial / CHUNKS).iterdir())) == 3
        again = import_source(source, out, processor, workers=0, **{**options, "max_bad": 5 / N})
        assert content(again.directory) == content(undisturbed.directory)

    def test_import_without_good_items(self, tmp_path, processor):
        with pytest.raises(ValueError, match="no records to import: all items are bad"):
            import_source(
                MadeUpSource(3, silent=(0, 1, 2)), tmp_path / "set", processor, workers=0, **{**SMALL, "max_bad": 1.0}
            )
        with pytest.raises(ValueError, match="'made-up' is empty"):
            import_source(MadeUpSource(0), tmp_path / "other", processor, workers=0, **SMALL)
        assert not (tmp_path / ".other.partial").exists()

    def test_unmarked_template_is_one_error(self, tmp_path, processor):
        unmarked = Processor(processor.tokenizer, ChatTemplate("{{ messages[0].content }}"), CONFIG)
        with pytest.raises(UnmarkedTemplateError):
            import_source(MadeUpSource(3), tmp_path / "set", unmarked, workers=0, **SMALL)
        assert list(tmp_path.iterdir()) == []

    def test_decode_rejects_broken_pixels(self, tmp_path, processor):
        source = RecordsSource([make_record(0), make_record(1, images=(png(24, 16)[:-100],))])
        options = {**SMALL, "max_bad": 0.5}
        assert len(import_source(source, tmp_path / "headers", processor, workers=0, **options)) == 2
        dataset = import_source(source, tmp_path / "pixels", processor, workers=0, decode=True, **options)
        assert len(dataset) == 1 and dataset.manifest["counts"]["quarantined"] == {"image-broken": 1}


class TestErrors:
    @pytest.fixture(autouse=True)
    def no_waiting(self, monkeypatch):
        self.waits: list[float] = []
        monkeypatch.setattr(retry.time, "sleep", self.waits.append)

    def test_io_error_is_retried(self, undisturbed, tmp_path, processor, caplog):
        source = MadeUpSource(N, **BAD, mishap="io", item=30, once=tmp_path / "happened")
        again = import_source(source, tmp_path / "set", processor, workers=0, **SMALL)
        assert content(again.directory) == content(undisturbed.directory)
        assert self.waits == [0.5] and "item 31 of made-up" in caplog.text

    def test_lasting_io_error_is_raised(self, tmp_path, processor):
        with pytest.raises(OSError, match="Input/output error") as raised:
            import_source(MadeUpSource(N, mishap="io", item=30), tmp_path / "set", processor, workers=0, **SMALL)
        assert self.waits == [0.5, 1.0, 2.0]
        assert raised.value.__notes__ == [
            f"completed chunks are in {tmp_path / '.set.partial'}; the same command continues from there"
        ]

    def test_permission_error_is_not_retried(self, tmp_path, processor):
        with pytest.raises(PermissionError):
            import_source(MadeUpSource(N, mishap="denied", item=30), tmp_path / "set", processor, workers=0, **SMALL)
        assert self.waits == []

    def test_source_ends_early(self, tmp_path, processor, monkeypatch):
        monkeypatch.setattr(MadeUpSource, "read", lambda self, a, b: iter(()))
        with pytest.raises(RuntimeError, match="'made-up' ends before item 0 of 60"):
            import_source(MadeUpSource(N), tmp_path / "set", processor, workers=0, **SMALL)

    def test_worker_dies(self, undisturbed, tmp_path, processor):
        source = MadeUpSource(N, **BAD, mishap="die", item=30, once=tmp_path / "happened")
        with pytest.raises(ChildProcessError, match="a worker process died"):
            import_source(source, tmp_path / "set", processor, workers=2, **SMALL)
        again = import_source(source, tmp_path / "set", processor, workers=2, **SMALL)
        assert content(again.directory) == content(undisturbed.directory)

    def test_full_disk(self, undisturbed, tmp_path, processor, monkeypatch):
        """The disk is full for the records, then for a chunk's own file."""
        source, folder = MadeUpSource(N, **BAD), tmp_path / ".set.partial" / WORK
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            with pytest.raises(
                OSError, match=r"records-00000-000.array_record cannot be written: File too large\ncompleted chunks"
            ):
                import_source(source, tmp_path / "set", processor, workers=0, **SMALL)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert list(folder.iterdir()) == []

        def full(path, content):
            raise OSError(28, "No space left on device", str(path))

        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
            patch.setattr(atomic, "write", full)
            import_source(source, tmp_path / "set", processor, workers=0, **SMALL)
        assert list(folder.iterdir()) == []
        again = import_source(source, tmp_path / "set", processor, workers=0, **SMALL)
        assert content(again.directory) == content(undisturbed.directory)

    def test_second_import_is_refused(self, tmp_path, processor, monkeypatch):
        def second(*args):
            with pytest.raises(BlockingIOError, match=r"another process is making .*set"):
                import_source(MadeUpSource(N), tmp_path / "set", processor, workers=0, **SMALL)
            return remove_strays(*args)

        remove_strays = work._remove_strays
        monkeypatch.setattr(work, "_remove_strays", second)
        assert len(import_source(MadeUpSource(N), tmp_path / "set", processor, workers=0, **SMALL)) == N


IMPORT = """
import sys
from pathlib import Path
sys.path.insert(0, {here!r})
from tests.support.records import CONFIG
from tests.support.generated_source import MadeUpSource
from phivision_jax.data.store.importing import import_source
from phivision_jax.processor import Processor

if __name__ == "__main__":
    source = MadeUpSource({n}, unreadable=(3, 17, 59), mishap={mishap!r}, item={item})
    options = dict(workers=int(sys.argv[2]), chunk={chunk}, shard_bytes=50_000, max_bad=0.2)
    import_source(source, sys.argv[1], Processor.small(CONFIG), **options)
"""


def start(
    tmp_path: Path, out: Path, workers: int, n: int, chunk: int, mishap: str = "", item: int = -1
) -> subprocess.Popen:
    script = tmp_path / f"import_{n}_{item}.py"
    script.write_text(IMPORT.format(here=str(ROOT), n=n, chunk=chunk, mishap=mishap, item=item))
    command = [sys.executable, str(script), str(out), str(workers)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def of_group(pid: int) -> list[int]:
    """The processes of a process group that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(group) == pid and state != "Z":
            found.append(int(path.parent.name))
    return found


@pytest.mark.parametrize("kills, n, chunk", [(3, 400, 16), pytest.param(10, 6_000, 64, marks=pytest.mark.slow)])
def test_import_survives_kills(tmp_path, processor, kills, n, chunk):
    """SIGKILL to every process at moments spread over the import, with none, one and two workers in turn."""
    undisturbed = tmp_path / "undisturbed"
    source, options = MadeUpSource(n, unreadable=(3, 17, 59)), {"chunk": chunk, "shard_bytes": 50_000, "max_bad": 0.2}
    import_source(source, undisturbed, processor, workers=0, **options)
    out, seen = tmp_path / "set", 0
    for kill in range(kills):
        process = start(tmp_path, out, kill % 3, n, chunk)
        # A further part of the chunks each time; the last kill comes when all may be done.
        wanted = seen + (-(-n // chunk) - seen) // (kills - kill) + kill % 2
        chunks = tmp_path / ".set.partial" / CHUNKS
        while process.poll() is None and len(list(chunks.glob("*"))) < min(wanted, -(-n // chunk)):
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        seen = len(list(chunks.glob("*")))
    assert seen or out.exists()
    process = start(tmp_path, out, 2, n, chunk)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert content(out) == content(undisturbed)
    assert Dataset.open(out).hash == Dataset.open(undisturbed).hash
    assert not list(tmp_path.glob(".*partial"))


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
def test_workers_die_with_parent(tmp_path):
    process = start(tmp_path, tmp_path / "set", 2, N, CHUNK, "sleep", 30)
    chunks = tmp_path / ".set.partial" / CHUNKS
    while process.poll() is None and len(list(chunks.glob("*"))) < 3:
        time.sleep(0.01)
    assert len(of_group(process.pid)) > 2
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while of_group(process.pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert of_group(process.pid) == []
