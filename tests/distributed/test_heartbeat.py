"""Hangs are reported and ended; heartbeats show what a process does."""

import os
import subprocess
import sys
import time

from phivision_jax.distributed import heartbeat
from phivision_jax.distributed.heartbeat import FAILED, HUNG, Watchdog
from tests.support.launched import ENVIRONMENT, ROOT

SCRIPT = """
import ctypes, os, sys, time
from pathlib import Path
from phivision_jax.distributed import heartbeat
heartbeat._FROZEN_S, heartbeat.HEARTBEAT_S = 3.0, 0.2
dog = heartbeat.Watchdog(Path(sys.argv[1]), limit_s=1.0)
for i in range(4):
    dog.alive("step", step=10 + i)
    time.sleep(0.7)  # each within the limit, together beyond it
dog.alive("compiling", limit_s=2.5)
time.sleep(1.5)
print("so far", flush=True)
dog.alive("data", step=14)
{then}
print("never")
"""


def run_script(run, then, **environment):
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(then=then), str(run)],
        cwd=ROOT, env=ENVIRONMENT | environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout == "so far\n", done.stderr
    return done.returncode, done.stderr, time.monotonic() - began


def test_hang_is_reported_and_ended(tmp_path):
    code, output, seconds = run_script(tmp_path, "time.sleep(60)")
    assert code == HUNG and seconds < 30
    assert "process 0 (" in output and "hangs: 'data' at step 14 has run for 1 s" in output
    assert "longer than the limit of 1 s (step_timeout_s raises this limit)" in output
    assert "most recent call first" in output and '"<string>", line ' in output  # the main thread's stack
    assert heartbeat.read(tmp_path)[0]["phase"] == "hung in data"


def test_hang_that_keeps_the_gil_is_ended(tmp_path):
    """Native code keeps the GIL: no Python thread can run."""
    code, output, seconds = run_script(tmp_path, "ctypes.PyDLL(None).sleep(60)")
    assert code != 0 and seconds < 30 and "Timeout" in output


def test_process_ends_with_its_launcher(tmp_path):
    """The launcher is dead."""
    launcher = subprocess.Popen([sys.executable, "-c", ""])
    launcher.wait()
    script = "import sys, time; from pathlib import Path; from phivision_jax.distributed.heartbeat import Watchdog; "
    script += "dog = Watchdog(Path(sys.argv[1]), 60.0); time.sleep(60)"
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=ROOT, env=ENVIRONMENT | {heartbeat.LAUNCHER: str(launcher.pid)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == HUNG and "the launcher of this process has died" in done.stderr


def test_heartbeats(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat, "HEARTBEAT_S", 0.1)
    monkeypatch.setattr(heartbeat, "_TICK_S", 0.02)
    assert heartbeat.read(tmp_path) == []
    dog = Watchdog(tmp_path, 60.0)
    deadline = time.monotonic() + 20
    seen = []
    for phase, step in (("compiling", None), ("step", 7), ("data", None)):
        dog.alive(phase, step=step)
        while not (beats := heartbeat.read(tmp_path)) or beats[0]["phase"] != phase:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        (beat,) = beats
        seen.append((beat["phase"], beat["step"]))
        assert beat["pid"] == os.getpid() and beat["process"] == 0 and abs(beat["time"] - time.time()) < 20
    dog.close()
    assert seen == [("compiling", 0), ("step", 7), ("data", 7)]
    assert heartbeat.read(tmp_path)[0]["phase"] == "ended"
    deep = '{"process": ' + "[" * 100_000
    for damaged in ('{"process":', "[]\n", "{}\n", '{"process": 0, "pid": "x"}\n', deep + "\n", "\0" * 20):
        (tmp_path / "heartbeat" / "process_0.json").write_text(damaged)
        assert heartbeat.read(tmp_path) == []


def test_no_process_has_an_impossible_id():
    assert heartbeat.exists(os.getpid()) and not heartbeat.exists(10**30)


def test_launched_process_that_cannot_write_heartbeats_ends(tmp_path):
    """Its launcher would take it for hung and restart it forever."""
    (tmp_path / "heartbeat" / ".process_0.json.partial").mkdir(parents=True)
    then = "heartbeat.UNWRITTEN_S = 0.5; time.sleep(60)".replace("; ", "\n")
    code, output, seconds = run_script(
        tmp_path, "dog.alive('step', 60.0, step=14)\n" + then, PHIVISION_LAUNCHER=str(os.getpid())
    )
    assert code == FAILED and seconds < 30
    assert "could not write its heartbeat for" in output and "process_0.json" in output
