"""Launchers, when processes end; these are small scripts without JAX. One process, and several together."""

import os
import signal
import sys
import time

import pytest

from phivision_jax.distributed import launch
from phivision_jax.distributed.heartbeat import HUNG, LOST, PREEMPTED
from tests.support.launched import Launched
from tests.support.paths import ROOT

SCRIPT = """
import os, signal, socket, sys, time
from pathlib import Path
from phivision_jax.distributed import heartbeat
folder, number = Path(sys.argv[1].split("=")[1]), int(os.environ.get("JAX_PROCESS_ID", 0))
last = number == int(os.environ.get("JAX_NUM_PROCESSES", 1)) - 1
start = len(list(folder.glob(f"start-{number}-*")))
(folder / f"start-{number}-{start}").write_text(" ".join(f"{n}={os.environ.get(n)}" for n in (
    "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")))
beat = {"process": number, "phase": "step", "step": 12, "time": time.time(), "pid": os.getpid(),
        "host": socket.gethostname()}
"""
BOTH = pytest.mark.parametrize("processes", [1, 2])


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def begin(folder, script, processes=2, restarts=3):
    command = [sys.executable, "-c", SCRIPT + script, f"--run={folder}"]
    return Launched(command, folder.parent / "log", processes, restarts)


def starts(folder):
    return len(list(folder.glob("start-0-*")))


def test_launch_many_sets_the_environment(folder):
    launched = begin(folder, "", processes=3)
    assert launched.finish() == 0 and starts(folder) == 1
    environments = [dict(word.split("=") for word in (folder / f"start-{i}-0").read_text().split()) for i in range(3)]
    assert [env["JAX_PROCESS_ID"] for env in environments] == ["0", "1", "2"]
    assert {env["JAX_NUM_PROCESSES"] for env in environments} == {"3"}
    assert len({env["JAX_COORDINATOR_ADDRESS"] for env in environments}) == 1


def test_launch_sets_no_coordinator(folder):
    """Nor that the process is the only one: on a slice it is not."""
    assert begin(folder, "", processes=1).finish() == 0
    assert "JAX_COORDINATOR_ADDRESS=None JAX_NUM_PROCESSES=None" in (folder / "start-0-0").read_text()


@pytest.mark.parametrize(
    ("processes", "how"),
    [
        *((1, how) for how in (f"sys.exit({PREEMPTED})", f"os._exit({HUNG})", f"os._exit({LOST})", "os.abort()")),
        *((n, "os.kill(os.getpid(), signal.SIGKILL)") for n in (1, 2)),
        (2, f"os._exit({LOST})"),
    ],
)
def test_launch_restarts(folder, processes, how):
    """The last process ends in this way in its first start; another one would run forever."""
    script = f"if start == 0 and last: heartbeat.write(folder, beat); {how}\nif start == 0: time.sleep(1000)"
    launched = begin(folder, script, processes)
    assert launched.finish() == 0, launched.output
    assert starts(folder) == 2
    assert "(pid" in launched.output and "step, step 12" in launched.output
    assert "2 restarts are left" in launched.output


@BOTH
def test_launch_does_not_restart_after_error(folder, processes):
    launched = begin(folder, "if last: sys.exit(1)\ntime.sleep(1000)", processes)
    assert launched.finish() == 1 and starts(folder) == 1
    assert "ended with code 1; it gave no heartbeat" in launched.output
    assert "giving up: " in launched.output and "ended with an error" in launched.output


@pytest.mark.parametrize("consequence", [f"os._exit({LOST})", "os.abort()"])
def test_launch_many_consequence_of_error_is_no_cause(folder, consequence):
    """JAX aborts a process whose peer is gone, which looks like a death of its own."""
    script = f"if number == 0: time.sleep(0.3); {consequence}\nsys.exit(1)"
    launched = begin(folder, script)
    assert launched.finish() == 1 and starts(folder) == 1, launched.output


def test_launch_many_death_that_fails_the_others_is_the_cause(folder):
    """A collective with a dead process raises in the others; that is no reason to give up."""
    script = "if start: sys.exit(0)\nif number == 0: sys.exit(1)\ntime.sleep(0.3); os.kill(os.getpid(), signal.SIGKILL)"
    launched = begin(folder, script)
    assert launched.finish() == 0 and starts(folder) == 2, launched.output


def test_launch_runs_out_of_restarts(folder):
    launched = begin(folder, "os.kill(os.getpid(), signal.SIGKILL)", processes=1, restarts=2)
    assert launched.finish() == 128 + signal.SIGKILL and starts(folder) == 3
    assert "no restarts are left" in launched.output


@BOTH
def test_launch_sigterm_reaches_all(folder, processes):
    script = f"signal.signal(signal.SIGTERM, lambda *_: sys.exit({PREEMPTED}))\n(folder / f'ready-{{number}}').touch()"
    launched = begin(folder, script + "\ntime.sleep(1000)", processes)
    launched.until(lambda: len(list(folder.glob("ready-*"))) == processes)
    launched.process.send_signal(signal.SIGTERM)
    assert launched.finish() == PREEMPTED and starts(folder) == 1
    assert launched.output.count("asked to stop, and has saved") == processes


@BOTH
def test_launch_second_signal_kills(folder, processes):
    script = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n(folder / f'ready-{number}').touch()\ntime.sleep(1000)"
    launched = begin(folder, script, processes)
    launched.until(lambda: len(list(folder.glob("ready-*"))) == processes)
    pids = launched.pids()
    for _ in range(2):
        launched.process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    assert launched.finish() != 0 and "without a save" in launched.output
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_launch_kills_silent_process(folder, monkeypatch, capsys):
    monkeypatch.setattr(launch, "SILENT_S", 1.0)
    monkeypatch.setattr(launch, "_LOOK_S", 0.2)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # pytest's handlers stay
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    script = "if start: sys.exit(0)\nheartbeat.write(folder, beat); time.sleep(1000)"
    command = [sys.executable, "-c", SCRIPT + script, f"--run={folder}"]
    assert launch.launch(command, str(folder), restarts=1, grace_s=5.0) == 0
    output = capsys.readouterr().err
    assert "killing process (pid" in output and "): its last heartbeat, 1 s ago: step, step 12" in output
    assert starts(folder) == 2


def test_run_of():
    assert launch.run_of(["python", "train.py", "--run=runs/a"]) == "runs/a"
    assert launch.run_of(["python", "train.py", "--run", "runs/b", "--x"]) == "runs/b"
    assert launch.run_of(["python", "train.py", "--run"]) == ""


def test_launch_ignores_heartbeats_of_other_hosts(folder):
    """The directory has those of all hosts; a silent one concerns the launcher of its host."""
    script = (
        "beat['host'] = 'elsewhere'; beat['time'] -= 3600; heartbeat.write(folder, beat); time.sleep(0.5); sys.exit(1)"
    )
    launched = begin(folder, script, processes=1)
    assert launched.finish() == 1 and "ended with code 1; it gave no heartbeat" in launched.output


@pytest.mark.parametrize("command", [(), ("phivison-misspelt", "train")])
def test_launch_names_a_command_that_does_not_exist(command):
    with pytest.raises(SystemExit, match=f"not {' '.join(command) or 'nothing'}$"):
        launch.main(command)
