"""Of all starts of a run, on one machine or several, one owns it; no clock of another machine is believed."""

import datetime
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from phivision_jax.distributed import run_lock
from phivision_jax.distributed.heartbeat import FAILED
from phivision_jax.distributed.run_lock import LostError, RunLock
from phivision_jax.io import storage
from tests.support.launched import ENVIRONMENT, ROOT


@pytest.fixture(params=["disk", "bucket"])
def run(request, tmp_path):
    return tmp_path / "run" if request.param == "disk" else storage.location(request.getfixturevalue("bucket"))


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(run_lock, "RENEW_S", 0.1)
    monkeypatch.setattr(run_lock, "SILENT_S", 1.0)
    monkeypatch.setattr(run_lock, "_TICK_S", 0.02)


@pytest.fixture
def elsewhere(monkeypatch):
    """From here on, this process is on another machine."""
    return lambda: monkeypatch.setattr(run_lock, "machine", lambda: "elsewhere")


def owners(run) -> dict[str, dict]:
    return {path.name: json.loads(path.read_text()) for path in storage.children(run / "owner")}


def leave(run, **changes) -> None:
    """The file of an owner that has been killed: this process, with changes."""
    lock = RunLock(run)
    lock._owner |= changes
    if isinstance(run, Path):
        (run / "owner").mkdir(parents=True, exist_ok=True)
    assert storage.create(run / "owner" / "1.json", json.dumps(lock._owner).encode())


def refused(run) -> str:
    with pytest.raises(ValueError, match="is being trained already") as error, RunLock(run):
        pass
    return str(error.value)


def test_second_start_on_the_same_machine_is_refused_at_once(run):
    with RunLock(run):
        (run / "metrics").write_text("1")
        message = refused(run)
        (owner,) = owners(run).values()
        assert f"{run} is being trained already, by process {os.getpid()} on {owner['host']} since 2" in message
        assert set(storage.files(run)) == {"metrics", "owner/1.json"}
    with RunLock(run):
        assert owners(run).keys() == {"2.json"}
    assert owners(run)["2.json"]["ended"]


def test_lock_is_renewed_and_released(run):
    with RunLock(run):
        deadline = time.monotonic() + 20
        while owners(run)["1.json"]["renewed"] < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert not owners(run)["1.json"]["ended"]
    assert owners(run)["1.json"]["ended"]


@pytest.mark.parametrize("how", ["gone", "reused", "zombie"])
def test_start_after_a_kill_on_the_same_machine_takes_over_at_once(run, monkeypatch, how):
    monkeypatch.setattr(run_lock, "SILENT_S", 1000.0)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    started = run_lock.start_of(child.pid)
    leave(run, pid=child.pid, started=started + 1 if how == "reused" else started)
    try:
        if how != "reused":
            assert f"process {child.pid} on" in refused(run)
            child.kill()
        if how == "gone":
            child.wait()
        while how == "zombie" and run_lock.start_of(child.pid):
            time.sleep(0.01)
        with RunLock(run, log=pytest.fail):
            assert owners(run).keys() == {"2.json"}
    finally:
        child.kill()
        child.wait()


def test_start_on_another_machine_waits_for_a_renewal_and_is_refused(run, elsewhere):
    lines: list[str] = []
    with RunLock(run):
        elsewhere()
        with pytest.raises(ValueError, match="is being trained already"), RunLock(run, lines.append):
            pass
        assert len(lines) == 1 and owners(run).keys() == {"1.json"}


def test_start_on_another_machine_waits_for_silence_and_takes_over(run, elsewhere, monkeypatch):
    monkeypatch.setattr(run_lock, "SILENT_S", 0.4)
    leave(run, pid=os.getpid())
    elsewhere()
    lines: list[str] = []
    began = time.monotonic()
    with RunLock(run, lines.append):
        assert time.monotonic() - began >= run_lock.SILENT_S
        assert owners(run).keys() == {"2.json"}
    (line,) = lines
    assert f"is owned by process {os.getpid()} on " in line and "no sign of life for 0 s" in line
    assert f"remove {run}/owner/1.json" in line


def test_end_on_another_machine_is_believed_at_once(run, elsewhere, monkeypatch):
    monkeypatch.setattr(run_lock, "SILENT_S", 1000.0)
    with RunLock(run):
        pass
    elsewhere()
    with RunLock(run, log=pytest.fail):
        assert owners(run).keys() == {"2.json"}


def test_end_during_the_wait_is_believed_at_once(run, elsewhere, monkeypatch):
    monkeypatch.setattr(run_lock, "SILENT_S", 1000.0)
    leave(run)
    lock = RunLock(run)
    ended = json.dumps({**owners(run)["1.json"], "ended": True})
    elsewhere()
    threading.Timer(0.2, (run / "owner" / "1.json").write_text, (ended,)).start()
    with lock:
        assert owners(run).keys() == {"2.json"}


@pytest.mark.parametrize("content", [b"", b'{"tok', b"[1]", b'{"token": 1}', b"\0" * 20], ids=range(5))
def test_unreadable_owner_counts_as_alive_until_it_is_silent(run, monkeypatch, content):
    monkeypatch.setattr(run_lock, "SILENT_S", 0.2)
    leave(run)
    (run / "owner" / "1.json").write_bytes(content)
    began = time.monotonic()
    with RunLock(run):
        assert time.monotonic() - began >= run_lock.SILENT_S and owners(run).keys() == {"2.json"}


def test_owner_that_was_just_writing_its_file_is_respected(run):
    leave(run)
    content = (run / "owner" / "1.json").read_bytes()
    (run / "owner" / "1.json").write_bytes(b"")
    threading.Timer(0.2, (run / "owner" / "1.json").write_bytes, (content,)).start()
    refused(run)


@pytest.mark.parametrize("left", [None, "dead"])
@pytest.mark.parametrize("far", [False, True])
def test_of_starts_at_one_moment_one_wins(run, monkeypatch, left, far):
    """All have found the owner gone before any of them creates the next file."""
    if left:
        leave(run, pid=2**22 + 1)
    barrier = threading.Barrier(4)
    real, places, waited = storage.create, threading.local(), threading.local()

    def create(path, content):
        if not hasattr(waited, "once"):
            waited.once = barrier.wait()
        return real(path, content)

    own = run_lock.machine()
    monkeypatch.setattr(storage, "create", create)
    monkeypatch.setattr(run_lock, "machine", lambda: getattr(places, "name", own))
    won, lost, over = [], [], threading.Event()

    def start(number):
        places.name = f"machine {number}" if far and not left else own
        try:
            with RunLock(run, log=lambda line: None) as lock:
                won.append(lock)
                over.wait()
        except ValueError as error:
            lost.append(str(error))

    threads = [threading.Thread(target=start, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 30
    while len(lost) < 3 or not won:
        assert time.monotonic() < deadline, (len(won), lost)
        time.sleep(0.02)
    won[0].renew()
    over.set()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and all("is being trained already" in message for message in lost)


def test_slow_start_does_not_take_a_number_that_was_passed(run, monkeypatch):
    """It found owner 1 gone; meanwhile 2 came and ended, and 3 owns the run."""
    leave(run, ended=True)
    real = storage.create

    def create(path, content):
        monkeypatch.setattr(storage, "create", real)
        with RunLock(run):
            pass
        other.__enter__()
        (run / "owner" / "2.json").unlink(missing_ok=True)
        return real(path, content)

    other = RunLock(run)
    monkeypatch.setattr(storage, "create", create)
    try:
        refused(run)
        other.renew()
    finally:
        other.__exit__()


def test_creation_whose_answer_was_lost_counts(run, monkeypatch):
    """The request was repeated, and found what the first one had made."""
    real = storage.create
    monkeypatch.setattr(storage, "create", lambda path, content: real(path, content) and False)
    with RunLock(run):
        assert owners(run).keys() == {"1.json"}


@pytest.mark.parametrize("how", ["taken", "removed"])
def test_owner_that_has_lost_its_run_notices(run, monkeypatch, how):
    monkeypatch.setattr(run_lock, "RENEW_S", 1000.0)
    lock = RunLock(run)
    lock._acquire()
    lock.renew()
    if how == "taken":
        leave_number_two = {**owners(run)["1.json"], "token": "other", "host": "tpu-9", "pid": 77}
        storage.create(run / "owner" / "2.json", json.dumps(leave_number_two).encode())
    else:
        (run / "owner" / "1.json").unlink()
    match = "its owner now: process 77 on tpu-9" if how == "taken" else "its owner now: nobody, because its file or"
    with pytest.raises(LostError, match=match):
        lock.renew()
    assert "1.json" not in owners(run) or how == "taken"


def test_process_that_has_lost_its_run_ends(tmp_path):
    script = (
        "import sys, time; from pathlib import Path; from phivision_jax.distributed import run_lock\n"
        "run_lock.RENEW_S = 0.1\n"
        "with run_lock.RunLock(Path(sys.argv[1])):\n    print('owns', flush=True)\n    time.sleep(60)\n"
    )
    words = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(words, cwd=ROOT, env=ENVIRONMENT, stdout=-1, stderr=-1, text=True) as child:
        assert child.stdout.readline() == "owns\n"
        (tmp_path / "owner" / "1.json").unlink()
        _, errors = child.communicate(timeout=60)
    assert child.returncode == FAILED and "was taken from this process" in errors and "this process ends" in errors


def test_suspended_owner_on_the_same_machine_keeps_its_run(run, monkeypatch):
    monkeypatch.setattr(run_lock, "SILENT_S", 0.2)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    try:
        os.kill(child.pid, signal.SIGSTOP)
        leave(run, pid=child.pid, started=run_lock.start_of(child.pid))
        time.sleep(2 * run_lock.SILENT_S)
        assert f"process {child.pid} on" in refused(run)
    finally:
        child.kill()
        child.wait()


@pytest.mark.parametrize("minutes", [-10, 10])
def test_clocks_decide_nothing(run, elsewhere, monkeypatch, minutes):
    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return super().now(tz) + datetime.timedelta(minutes=minutes)

    with RunLock(run):
        elsewhere()
        monkeypatch.setattr(time, "time", lambda: pytest.fail("a clock was read"))
        monkeypatch.setattr(datetime, "datetime", Clock)
        refused(run)


def test_bucket_that_is_down_ends_nothing(bucket, monkeypatch):
    """Other writes report it."""

    def children(path):
        raise storage.Unreachable("down")

    with RunLock(storage.location(bucket)) as lock, monkeypatch.context() as patch:
        patch.setattr(storage, "children", children)
        lock.renew()
