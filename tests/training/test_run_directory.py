"""The mirror of a run in a bucket: what is fetched, what is sent, and in which order."""

import json
import threading
import time

import pytest

from phivision_jax.distributed import heartbeat
from phivision_jax.io import storage
from phivision_jax.training import run_directory
from phivision_jax.training.run_directory import RunDirectory, local_directories


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    monkeypatch.setenv(storage.SCRATCH, str(tmp_path / "scratch"))
    return tmp_path / "scratch"


def put(run: str, **contents: str) -> None:
    for name, content in contents.items():
        (storage.location(run) / name.replace("__", "/")).write_text(content)


def there(run: str) -> dict[str, str]:
    place = storage.location(run)
    return {name: (place / name).read_text() for name in storage.files(place)}


def test_a_local_run_is_its_own_mirror(tmp_path):
    with RunDirectory(str(tmp_path / "run")) as directory:
        assert directory.local == directory.url == tmp_path / "run" and directory.local.is_dir()
        (directory.local / "assets").mkdir()
        directory.give("assets")
        directory.take("plan")
        directory.push()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["assets"]
    assert local_directories("runs/a") == [run_directory.Path("runs/a")] and local_directories("") == []


@pytest.mark.parametrize("alive", [True, False])
def test_a_second_start_in_the_bucket_is_refused_while_the_first_lives(bucket, scratch, monkeypatch, alive):
    monkeypatch.setattr(run_directory, "RENEWED_S", 2.0)
    over = threading.Event()

    def beat():
        while True:
            line = {"process": 0, "phase": "step", "step": 7, "time": time.time(), "pid": 1, "host": "elsewhere"}
            put(bucket, **{"heartbeat__process_0.json": json.dumps(line)})
            if over.wait(0.5):
                return

    first = threading.Thread(target=beat)
    first.start()
    while not heartbeat.read(storage.location(bucket)):
        time.sleep(0.05)
    if not alive:
        over.set()
        first.join()
    try:
        if alive:
            with (
                pytest.raises(ValueError, match=r"is being trained already: process 0 .* at step 7"),
                RunDirectory(bucket),
            ):
                pass
        else:
            with RunDirectory(bucket) as directory:
                assert directory.mirrored
    finally:
        over.set()
        first.join()


def test_what_the_first_start_sends_until_it_ends_is_fetched(bucket, scratch):
    def beat(phase):
        line = {"process": 0, "phase": phase, "step": 7, "time": time.time(), "pid": 1, "host": "elsewhere"}
        put(bucket, **{"heartbeat__process_0.json": json.dumps(line)})

    def end():
        put(bucket, metrics="to the end", checkpoints__7__x="large")
        beat("ended")

    put(bucket, plan__half="of a plan")
    beat("saving")
    threading.Timer(1.0, end).start()
    with RunDirectory(bucket) as directory:
        assert (directory.local / "metrics").read_text() == "to the end"
        assert (directory.local / "plan" / "half").exists()  # a run with a checkpoint has its plan whole


def test_fetched_cleared_and_sent(bucket):
    put(bucket, metrics="1", checkpoints__3__x="large", profile__p="old", heartbeat__process_0="old", plan__a="p")
    with RunDirectory(bucket) as directory:
        assert there(bucket)["metrics"] == "1" and storage.files(directory.local) == {"metrics": 1, "plan/a": 1}
        (directory.local / "metrics").write_text("1 2")
        (directory.local / "sub").mkdir()
        (directory.local / "sub" / "new").write_text("n")
        for passing in ("records.partial", "metrics.tmp", ".hidden"):
            (directory.local / passing).touch()
        directory.push()
        assert there(bucket) == {
            "metrics": "1 2", "sub/new": "n", "plan/a": "p",
            "checkpoints/3/x": "large", "profile/p": "old", "heartbeat/process_0": "old",
        }  # fmt: skip
        (directory.local / "last").write_text("l")
    assert there(bucket)["last"] == "l"
    put(bucket, metrics="other")  # by a start on another machine
    (directory.local / "stray").touch()
    with RunDirectory(bucket) as directory:
        assert (directory.local / "metrics").read_text() == "other" and not (directory.local / "stray").exists()
    assert there(bucket)["metrics"] == "other"


def test_only_what_has_changed_is_sent(bucket, monkeypatch):
    sent: list[str] = []
    upload = storage.upload
    monkeypatch.setattr(storage, "upload", lambda a, b, names: (sent.extend(names), upload(a, b, names)))
    put(bucket, a="1", b="2")
    with RunDirectory(bucket) as directory:
        directory.push()
        assert sent == []
        (directory.local / "b").write_text("3")  # as many bytes
        directory.push()
        directory.push()
    assert sent == ["b"]


@pytest.mark.parametrize("processes", [1, 2])
def test_the_log_of_a_process_is_sent_by_itself(bucket, processes):
    """Or by the first, where the process that wrote it is no more."""
    names = ["records_1.jsonl", "skipped_1.jsonl", "quarantine-1.jsonl", "heartbeat/process_1.json"]
    with RunDirectory(bucket, 0, processes) as first:
        (first.local / "heartbeat").mkdir()
        for name in (*names, "records_0.jsonl", "metrics.jsonl"):
            (first.local / name).write_text("of the first")
    sent = {"records_0.jsonl", "metrics.jsonl"} | (set(names) if processes == 1 else set())
    assert set(there(bucket)) == sent
    with RunDirectory(bucket, 1, 2) as second:
        (second.local / "records_1.jsonl").write_text("its own")
        (second.local / "records_0.jsonl").write_text("not its own")
    assert there(bucket)["records_1.jsonl"] == "its own" and there(bucket)["records_0.jsonl"] == "of the first"


def test_half_a_directory_counts_as_none(bucket):
    put(bucket, plan__a="half")
    with RunDirectory(bucket) as first, RunDirectory(bucket, 1, 2) as second:
        assert not (first.local / "plan").exists()
        (first.local / "plan").mkdir()
        for name in "ab":
            (first.local / "plan" / name).write_text("whole")
        second.take("plan")
        assert (second.local / "plan" / "a").read_text() == "half"  # nobody takes before it is given; see setup.py
        first.give("plan")
    with RunDirectory(bucket, 1, 2) as second:
        assert (second.local / "plan" / "a").read_text() == (second.local / "plan" / "b").read_text() == "whole"


def test_the_mark_is_sent_last(bucket, monkeypatch):
    """Killed while its files are sent, a directory has no mark."""

    def upload(source, target, names):
        if "plan/a" in names:
            raise KeyboardInterrupt
        real(source, target, names)

    real = storage.upload
    with RunDirectory(bucket) as directory:
        (directory.local / "plan").mkdir()
        (directory.local / "plan" / "a").touch()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(storage, "upload", upload)
            directory.give("plan")
        assert there(bucket) == {}


def test_sent_beside_training_and_a_failure_is_told_once(bucket, monkeypatch):
    told: list[str] = []
    monkeypatch.setattr(run_directory, "PUSH_S", 0.02)
    real, broken = storage.upload, [False]

    def upload(source, target, names):
        if broken[0] and names:
            raise storage.Unreachable("gs://b: the bucket does not answer")
        real(source, target, names)

    monkeypatch.setattr(storage, "upload", upload)
    with RunDirectory(bucket, say=told.append) as directory:
        (directory.local / "a").write_text("1")
        until(lambda: there(bucket) == {"a": "1"})
        broken[0] = True
        (directory.local / "a").write_text("12")
        until(lambda: told)
        time.sleep(0.2)
        assert len(told) == 1
        assert told[0].startswith(
            "gs://b: the bucket does not answer; training goes on, and its log is sent as soon as"
        )
        broken[0] = False
        until(lambda: there(bucket) == {"a": "12"})


def test_a_bucket_that_does_not_answer_is_tried_again_for_a_while(bucket, monkeypatch):
    tries: list[float] = []
    real = storage.upload

    def upload(source, target, names):
        if names and (tries.append(time.monotonic()) or len(tries) < 4):
            raise storage.Unreachable("no answer")
        real(source, target, names)

    monkeypatch.setattr(storage, "upload", upload)
    with RunDirectory(bucket) as directory:
        (directory.local / "a").touch()
        directory.push()
        assert len(tries) == 4 and "a" in there(bucket)
        monkeypatch.setattr(run_directory, "PATIENCE_S", 0.1)
        tries[:] = []
        monkeypatch.setattr(storage, "upload", lambda *_: (time.sleep(0.06), upload(*_), tries.clear()))
        (directory.local / "a").write_text("1")
        with pytest.raises(storage.Unreachable):
            directory.push()
        monkeypatch.setattr(storage, "upload", real)


def test_what_may_not_be_sent_is_told_at_once(bucket, monkeypatch):
    tries: list[int] = []
    monkeypatch.setattr(run_directory, "PATIENCE_S", 0.1)

    def upload(source, target, names):
        if names:
            tries.append(1)
            raise storage.StorageError("may not")

    with pytest.raises(storage.StorageError, match="may not"), RunDirectory(bucket) as directory:
        (directory.local / "a").touch()
        monkeypatch.setattr(storage, "upload", upload)
        directory.push()
    assert len(tries) == 1


def test_no_bucket_no_start(bucket):
    with pytest.raises(storage.StorageError, match="there is no bucket nobody-s"), RunDirectory("gs://nobody-s/run"):
        pass


def test_what_has_failed_is_told_and_not_what_fails_after_it(bucket, monkeypatch):
    """An error of training reaches the user, whatever the bucket does; its log is sent where that can be."""

    def upload(source, target, names):
        if names:
            raise storage.Unreachable("no answer")

    with pytest.raises(FloatingPointError), RunDirectory(bucket) as directory:
        (directory.local / "skipped.jsonl").write_text("1")
        raise FloatingPointError("too many steps")
    assert there(bucket) == {"skipped.jsonl": "1"}
    with pytest.raises(FloatingPointError), RunDirectory(bucket) as directory:
        (directory.local / "skipped.jsonl").write_text("2")
        monkeypatch.setattr(storage, "upload", upload)
        raise FloatingPointError("too many steps")


def test_a_look_at_a_run_leaves_it_and_other_mirrors_alone(bucket, scratch):
    put(bucket, metrics="1")
    with RunDirectory(bucket) as training:
        (training.local / "mine").write_text("m")
        with RunDirectory(bucket, keeps=False) as looking:
            assert (looking.local / "metrics").read_text() == "1" and looking.local != training.local
            (looking.local / "metrics").write_text("2")
            looking.push()
        assert (training.local / "mine").exists() and not looking.local.exists()
        assert there(bucket) == {"metrics": "1"}


def test_the_launcher_finds_the_heartbeats_of_every_process(bucket, scratch):
    with RunDirectory(bucket) as first, RunDirectory(bucket, 1, 2) as second:
        assert first.local != second.local
        for process, directory in enumerate((first, second)):
            heartbeat.write(directory.local, {"process": process, "phase": "step", "step": 1, "time": 0.0, "pid": 1,
                                              "host": "h"})  # fmt: skip
        found = [beat["process"] for path in local_directories(bucket) for beat in heartbeat.read(path)]
        assert sorted(found) == [0, 1]
    assert set(there(bucket)) == {"heartbeat/process_0.json", "heartbeat/process_1.json"}


def until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
