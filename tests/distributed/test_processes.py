"""Several processes of one run: they stop at the same step, and an error or a death of one ends all."""

import os
import signal
import subprocess
import sys

import jax
import pytest

from phivision_jax.checkpoint.layout import CHECKPOINTS
from phivision_jax.distributed import processes
from phivision_jax.distributed.heartbeat import FAILED, LOST, PREEMPTED, read
from phivision_jax.training.telemetry.metrics import read_metrics
from tests.support.launched import ENVIRONMENT, ROOT, Launched, stand_in

NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def saved(run):
    return max((int(path.name) for path in (run / CHECKPOINTS).glob("*") if path.name.isdecimal()), default=0)


def test_initialize_single_process(monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: pytest.fail("called"))
    monkeypatch.setenv("JAX_NUM_PROCESSES", "1")
    processes.initialize()


def test_initialize_without_cluster(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)

    def nothing_found(**_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", nothing_found)
    processes.initialize()

    def other(**_):
        raise ValueError("something else")

    monkeypatch.setattr(jax.distributed, "initialize", other)
    with pytest.raises(ValueError, match="something else"):
        processes.initialize()


@pytest.mark.parametrize("name", NAMES)
def test_initialize_refuses_half_an_environment(monkeypatch, name):
    """Without the error each process would train alone, into the same directory."""
    for other in NAMES:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "2")
    missing = ", ".join(other for other in NAMES if other != name)
    with pytest.raises(ValueError, match=f"or none; missing: {missing}"):
        processes.initialize()


def test_preemption_on_sigterm_and_ctrl_c(capsys):
    for number in (signal.SIGTERM, signal.SIGINT):
        before = signal.getsignal(number)
        with processes.Preemption(10) as preemption:
            assert not preemption.reached(11)
            os.kill(os.getpid(), number)
            assert preemption.reached(12) and preemption.reached(13)
        assert signal.getsignal(number) is before
    assert "Ctrl-C again quits at once" in capsys.readouterr().err
    with processes.Preemption(10) as preemption:
        assert not preemption.reached(11)


# The last line is an hour of native code, during which Python calls no signal handler, as while compiling.
STARTING = """
import functools, hashlib, os, signal, threading, time
from phivision_jax.distributed import processes
processes.exit_on_signal()
{before}
threading.Timer(0.5, functools.partial(print, "compiling", flush=True)).start()
hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""
STOPPING = """
with processes.Preemption(0) as preemption:
    os.kill(os.getpid(), signal.SIGTERM)
    while not preemption.reached(1):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.3)
    print("saved", flush=True)
"""


@pytest.mark.parametrize(
    ("number", "before", "printed"),
    [(signal.SIGTERM, "", ""), (signal.SIGINT, "", ""), (signal.SIGTERM, STOPPING, "saved\n")],
    ids=["SIGTERM", "Ctrl-C", "SIGTERM after two while saving"],
)
def test_exit_on_signal_ends_at_once(number, before, printed):
    words = [sys.executable, "-c", STARTING.format(before=before)]
    with subprocess.Popen(
        words, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout.read(len(printed + "compiling")) == printed + "compiling"
            process.send_signal(number)
            assert process.wait(30) == PREEMPTED
            assert process.stderr.read() == "asked to stop, with nothing to save\n"
        finally:
            process.kill()


def test_propagate_failure_of_one_process_just_raises():
    with pytest.raises(OSError, match="the disk is full"), processes.propagate_failure("train", (OSError,)):
        raise OSError("the disk is full")


def test_error_of_one_process_ends_all(tmp_path):
    """The other one is waiting in a collective."""
    run = tmp_path / "run"
    trouble = ("--trouble=error", "--at-step=8", "--at-process=1")
    launched = Launched(stand_in(run, "--steps=1000", *trouble), tmp_path / "log", restarts=3)
    assert launched.finish() == FAILED, launched.output
    assert "process 1 has failed: the disk is full; process 0 ends with it" in launched.output
    assert "stand_in.py: the disk is full" in launched.output
    assert "giving up: process" in launched.output and launched.output.count("launch: started") == 1
    for number in (0, 1):
        assert f"process {number} of 2 hears: process 1 of 2 has an error" in launched.output


@pytest.mark.slow
def test_preemption_before_the_first_step(tmp_path):
    """One process of a continued run is notified while it compiles: nobody has asked JAX yet."""
    run = tmp_path / "run"
    assert Launched(stand_in(run, "--steps=6"), tmp_path / "log").finish() == 0
    launched = Launched(stand_in(run, "--steps=1000", "--pause=0.02", "--slow-start=3"), tmp_path / "log")
    launched.until(lambda: launched.output.count("has an error") == 2)
    os.kill(launched.pids()[1], signal.SIGTERM)
    assert launched.finish() == PREEMPTED, launched.output
    for number in (0, 1):
        assert f"process {number} of 2: asked to stop, saved step 7" in launched.output
    assert saved(run) == 7 and read_metrics(run)[-1]["step"] == 7


@pytest.mark.slow
def test_four_processes_stop_at_the_same_step(tmp_path):
    """SIGTERM to one; then to the launcher, which passes it on to all and does not restart them."""
    run = tmp_path / "run"
    command = stand_in(run, "--steps=100000", "--pause=0.02")
    launched = Launched(command, tmp_path / "log", processes=4, restarts=1)
    launched.until(lambda: len(read_metrics(run)) > 10)
    os.kill(launched.pids()[2], signal.SIGTERM)
    launched.until(lambda: launched.output.count("continuing from") == 4)
    first = saved(run)
    for number in range(4):
        assert f"process {number} of 4: asked to stop, saved step {first}" in launched.output
        assert f"process {number} of 4: continuing from step {first}" in launched.output
        assert f"process {number} of 4 hears: process 3 of 4 has an error" in launched.output
    launched.until(lambda: read_metrics(run)[-1]["step"] > first)
    launched.process.send_signal(signal.SIGTERM)
    assert launched.finish() == PREEMPTED
    assert launched.output.count("launch: started") == 2 and saved(run) > first
    assert [(beat["process"], beat["phase"]) for beat in read(run)] == [(i, "ended") for i in range(4)]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_death_of_one_process_ends_the_others(tmp_path, victim):
    """Without a launcher, as on the hosts of a slice: nobody waits for a killed process."""
    run = tmp_path / "run"
    launched = Launched(stand_in(run, "--steps=100000", "--pause=0.02"), tmp_path / "log")
    launched.until(lambda: len(read_metrics(run)) > 10)
    pids = launched.pids()
    launched.process.send_signal(signal.SIGSTOP)  # the launcher would end it at once
    try:
        os.kill(pids[victim], signal.SIGKILL)
        launched.until(lambda: not alive(pids[1 - victim]))
    finally:
        launched.process.send_signal(signal.SIGCONT)
    launched.finish()
    assert f"(pid {pids[victim]}) was killed by SIGKILL" in launched.output
    other = launched.output.split(f"(pid {pids[1 - victim]}) ")[-1]
    assert other.startswith((f"ended with code {LOST} ", "was killed by SIGABRT"))


def alive(pid: int) -> bool:
    """False for a zombie, whose parent is stopped."""
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0] != "Z"
