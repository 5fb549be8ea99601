"""The local copy of a run in a bucket: what is fetched and sent, and in which order."""

import time
from pathlib import Path

import pytest

from phivision_jax.distributed import heartbeat, run_lock
from phivision_jax.io import storage
from phivision_jax.training import run_directory
from phivision_jax.training.run_directory import RunDirectory


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    monkeypatch.setenv(storage.SCRATCH, str(tmp_path / "scratch"))
    return tmp_path / "scratch"


def put(run: str, **contents: str) -> None:
    for name, content in contents.items():
        (storage.location(run) / name.replace("__", "/")).write_text(content)


def get(run: str) -> dict[str, str]:
    place = storage.location(run)
    return {name: (place / name).read_text() for name in storage.files(place)}


def until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_local_run_needs_no_copy(tmp_path):
    with RunDirectory(str(tmp_path / "run")) as directory:
        assert directory.local == directory.url == tmp_path / "run" and directory.local.is_dir()
        (directory.local / "assets").mkdir()
        directory.push()
        directory.pull("plan")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["assets"]
    assert heartbeat.local_directories("runs/a") == [Path("runs/a")] and heartbeat.local_directories("") == []


def test_run_in_a_directory_above(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with RunDirectory("../run") as directory:
        assert directory.local == directory.url == tmp_path / "run" and directory.local.is_dir()


def test_fetch_and_push(bucket):
    put(bucket, metrics="1", checkpoints__3__x="large", profile__p="old", heartbeat__process_0="old", plan__a="p")
    with RunDirectory(bucket) as directory:
        assert get(bucket)["metrics"] == "1" and storage.files(directory.local) == {"metrics": 1, "plan/a": 1}
        (directory.local / "metrics").write_text("1 2")
        (directory.local / "sub").mkdir()
        (directory.local / "sub" / "new").write_text("n")
        for temporary in ("records.partial", "metrics.tmp", ".hidden"):
            (directory.local / temporary).touch()
        directory.push()
        assert get(bucket) == {
            "metrics": "1 2", "sub/new": "n", "plan/a": "p",
            "checkpoints/3/x": "large", "profile/p": "old", "heartbeat/process_0": "old",
        }  # fmt: skip
        (directory.local / "last").write_text("l")
    assert get(bucket)["last"] == "l"
    put(bucket, metrics="other")  # by a start on another machine
    with RunDirectory(bucket) as second:
        assert (second.local / "metrics").read_text() == "other" and not directory.local.exists()
    assert get(bucket)["metrics"] == "other"


def test_copy_belongs_to_one_process(bucket):
    """Even two that both took themselves for the owner would not share one; what ended processes left is removed."""
    with RunDirectory(bucket) as first:
        (first.local / "log").write_text("1")
        with RunDirectory(bucket) as second:
            assert (first.local / "log").read_text() == "1" and second.local != first.local
        with RunDirectory(bucket):
            assert not second.local.exists()
        first.push()
    assert get(bucket)["log"] == "1" and first.local.exists()


def test_start_that_has_lost_the_run_sends_nothing(bucket, monkeypatch):
    monkeypatch.setattr(run_lock, "RENEW_S", 1000.0)
    monkeypatch.setattr(run_lock, "SILENT_S", -1.0)
    directory = RunDirectory(bucket)
    with pytest.raises(run_lock.LostError, match="its owner now: nobody"), directory.lock, directory:
        (directory.local / "log").write_text("1")
        storage.remove(directory.url / "owner")
        directory.push()
    assert get(bucket) == {}


def test_fetch_leaves_the_owner_where_it_is(bucket):
    directory = RunDirectory(bucket)
    with directory.lock, directory:
        assert get(bucket).keys() == {"owner/1.json"} and not (directory.local / "owner").exists()


def test_push_sends_changed_files_only(bucket, monkeypatch):
    sent: list[str] = []
    upload = storage.upload
    monkeypatch.setattr(storage, "upload", lambda a, b, names: (sent.extend(names), upload(a, b, names)))
    put(bucket, a="1", b="2")
    with RunDirectory(bucket) as directory:
        directory.push()
        assert sent == []
        (directory.local / "b").write_text("3")  # of the same size
        directory.push()
        directory.push()
    assert sent == ["b"]


@pytest.mark.parametrize("processes", [1, 2])
def test_push_of_numbered_files_by_their_process(bucket, processes):
    """Or by the first, if this start has no such process."""
    names = ["records_1.jsonl", "skipped_1.jsonl", "quarantine-1.jsonl", "heartbeat/process_1.json"]
    with RunDirectory(bucket, 0, processes) as first:
        (first.local / "heartbeat").mkdir()
        for name in (*names, "records_0.jsonl", "metrics.jsonl"):
            (first.local / name).write_text("of the first")
    sent = {"records_0.jsonl", "metrics.jsonl"} | (set(names) if processes == 1 else set())
    assert set(get(bucket)) == sent
    with RunDirectory(bucket, 1, 2) as second:
        (second.local / "records_1.jsonl").write_text("its own")
        (second.local / "records_0.jsonl").write_text("not its own")
    assert get(bucket)["records_1.jsonl"] == "its own" and get(bucket)["records_0.jsonl"] == "of the first"


def test_plan_is_made_again_while_there_is_no_checkpoint(bucket):
    """A kill may have left a part of it. The first process removes that, makes it again, and others pull it."""
    put(bucket, plan__old="a part", metrics="1")
    with RunDirectory(bucket) as first, RunDirectory(bucket, 1, 2) as second:
        assert not (first.local / "plan").exists() and not (second.local / "plan").exists()
        (first.local / "plan").mkdir()
        for name in "ab":
            (first.local / "plan" / name).write_text("complete")
        first.push()
        second.pull("plan")
        assert {path.name for path in (second.local / "plan").iterdir()} == {"a", "b"}
    assert set(get(bucket)) == {"plan/a", "plan/b", "metrics"}
    put(bucket, checkpoints__3__x="large")
    with RunDirectory(bucket, 1, 2) as second:
        assert (second.local / "plan" / "b").read_text() == "complete"


def test_local_plan_is_made_again_while_there_is_no_checkpoint(tmp_path):
    """The start before may have failed after its plan, for settings that the user has changed since."""
    for name in ("plan", "assets", "tensorboard"):
        (tmp_path / name).mkdir()
    for other in (RunDirectory(str(tmp_path), 1, 2), RunDirectory(str(tmp_path), readonly=True)):
        with other:
            assert (tmp_path / "plan").exists() and (tmp_path / "assets").exists()
    with RunDirectory(str(tmp_path)):
        assert [path.name for path in tmp_path.iterdir()] == ["tensorboard"]
    (tmp_path / "plan").mkdir()
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    with RunDirectory(str(tmp_path)):
        assert (tmp_path / "plan").exists()


def test_background_push_reports_failure_once(bucket, monkeypatch):
    messages: list[str] = []
    monkeypatch.setattr(run_directory, "PUSH_S", 0.02)
    real, broken = storage.upload, [False]

    def upload(source, target, names):
        if broken[0] and names:
            raise storage.Unreachable("gs://b: the bucket does not answer")
        real(source, target, names)

    monkeypatch.setattr(storage, "upload", upload)
    with RunDirectory(bucket, log=messages.append) as directory:
        (directory.local / "a").write_text("1")
        until(lambda: get(bucket) == {"a": "1"})
        broken[0] = True
        (directory.local / "a").write_text("12")
        until(lambda: messages)
        time.sleep(0.2)
        assert len(messages) == 1
        assert messages[0].startswith(
            "gs://b: the bucket does not answer; training continues, and its logs are sent as"
        )
        broken[0] = False
        until(lambda: get(bucket) == {"a": "12"})


def test_push_retries_an_unresponsive_bucket(bucket, monkeypatch):
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
        assert len(tries) == 4 and "a" in get(bucket)
        monkeypatch.setattr(run_directory, "PATIENCE_S", 0.1)
        tries[:] = []
        monkeypatch.setattr(storage, "upload", lambda *_: (time.sleep(0.06), upload(*_), tries.clear()))
        (directory.local / "a").write_text("1")
        with pytest.raises(storage.Unreachable):
            directory.push()
        monkeypatch.setattr(storage, "upload", real)


def test_push_without_permission_fails_at_once(bucket, monkeypatch):
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
    assert len(tries) == 2  # by push, and once more at the exit


def test_missing_bucket(bucket):
    with pytest.raises(storage.StorageError, match="there is no bucket nobody-s"), RunDirectory("gs://nobody-s/run"):
        pass


def test_exit_reports_the_first_error(bucket, monkeypatch):
    """An error of training reaches the user, whatever the bucket does; the log is sent if that is possible."""

    def upload(source, target, names):
        if names:
            raise storage.Unreachable("no answer")

    with pytest.raises(FloatingPointError), RunDirectory(bucket) as directory:
        (directory.local / "skipped.jsonl").write_text("1")
        raise FloatingPointError("too many steps")
    assert get(bucket) == {"skipped.jsonl": "1"}
    with pytest.raises(FloatingPointError), RunDirectory(bucket) as directory:
        (directory.local / "skipped.jsonl").write_text("2")
        monkeypatch.setattr(storage, "upload", upload)
        raise FloatingPointError("too many steps")


def test_readonly_changes_nothing(bucket, scratch):
    put(bucket, metrics="1", plan__a="p")
    with RunDirectory(bucket) as training:
        (training.local / "mine").write_text("m")
        put(bucket, plan__a="p")
        with RunDirectory(bucket, readonly=True) as looking:
            assert (looking.local / "metrics").read_text() == "1" and looking.local != training.local
            assert (looking.local / "plan" / "a").exists()
            (looking.local / "metrics").write_text("2")
            looking.push()
        assert (training.local / "mine").exists() and not looking.local.exists()
        assert get(bucket) == {"metrics": "1", "plan/a": "p"}


def test_launcher_finds_heartbeats_of_every_process(bucket, scratch):
    with RunDirectory(bucket) as first, RunDirectory(bucket, 1, 2) as second:
        assert first.local != second.local
        for process, directory in enumerate((first, second)):
            heartbeat.write(directory.local, {"process": process, "phase": "step", "step": 1, "time": 0.0, "pid": 1,
                                              "host": "h"})  # fmt: skip
        found = [beat["process"] for path in heartbeat.local_directories(bucket) for beat in heartbeat.read(path)]
        assert sorted(found) == [0, 1]
    assert set(get(bucket)) == {"heartbeat/process_0.json", "heartbeat/process_1.json"}
