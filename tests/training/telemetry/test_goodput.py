"""The account of wall time, on a clock that the test moves; no test waits for real time."""

import json
import queue
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from phivision_jax.io import jsonl
from phivision_jax.training.telemetry.goodput import FILE, Goodput, account_of, process_age, read_starts, report


class Pending:
    """Metrics of a step that runs until the test finishes it."""

    def __init__(self):
        self.finished = queue.Queue()

    def block_until_ready(self):
        self.finished.get(timeout=10)


class World:
    """A clock, and devices that finish a step on demand."""

    def __init__(self, monkeypatch):
        self.time, self.metrics, self._monkeypatch = 0.0, Pending(), monkeypatch
        clock = SimpleNamespace(perf_counter=lambda: self.time, time=lambda: 1000.0 + self.time)
        monkeypatch.setattr("phivision_jax.training.telemetry.goodput.time", clock)

    def process(self, run=None, age=0.0, time=None):
        self.time = self.time if time is None else time
        self.metrics = Pending()
        self._monkeypatch.setattr("phivision_jax.training.telemetry.goodput.process_age", lambda: age)
        return Goodput(run)

    def step(self):
        return "state", self.metrics

    def spend(self, seconds):
        self.time += seconds

    def finish(self, goodput):
        """Finish the oldest running step and wait until that is noticed."""
        before = goodput._running
        self.metrics.finished.put(None)
        with goodput._changed:
            assert goodput._changed.wait_for(lambda: goodput._running == before - 1, timeout=10)


def spent(goodput):
    goodput.row()  # up to now
    return {name: seconds for name, seconds in goodput.seconds.items() if seconds}


@pytest.fixture
def world(monkeypatch):
    return World(monkeypatch)


def test_close_hides_no_error(world, tmp_path):
    """On a full disk the first error is the informative one."""

    def start(name):
        goodput = world.process(tmp_path / name)
        (tmp_path / name / FILE).unlink()
        (tmp_path / name / FILE).mkdir()
        return goodput

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match="the first"), start("a"):
        raise ValueError("the first")
    with pytest.raises(IsADirectoryError, match=FILE), start("b"):
        pass


def test_sections_nest(world):
    goodput = world.process(age=3.0)
    world.spend(2)
    with goodput("restore"):
        world.spend(5)
        with goodput("compile"):
            world.spend(7)
        world.spend(11)
    with pytest.raises(OSError), goodput("checkpoint"):
        world.spend(13)
        raise OSError
    world.spend(17)
    assert spent(goodput) == {"other": 3 + 2 + 17, "restore": 16, "compile": 7, "checkpoint": 13}


def test_host_work_while_a_step_runs_is_step_time(world):
    goodput = world.process()
    with goodput("data"):
        world.spend(1)
    assert goodput.run(world.step) == ("state", world.metrics)
    with goodput("data"):
        world.spend(20)
        world.finish(goodput)
        world.spend(3)  # the devices have nothing to do
    with goodput("host"):
        world.spend(4)
    goodput.run(world.step)
    with goodput("checkpoint"):
        world.spend(5)
        world.finish(goodput)
        world.spend(6)
    assert spent(goodput) == {"data": 1 + 3, "step": 20 + 5, "host": 4, "checkpoint": 6}
    goodput.run(world.step)
    world.spend(2)
    world.finish(goodput)
    # From end to end, without the save.
    assert goodput.durations() == [1 + 20, 3 + 4 + 5, 2]
    assert goodput.durations() == []


def test_run_overlaps_two_steps(world):
    goodput = world.process()
    goodput.run(world.step)
    goodput.run(world.step)
    world.spend(5)

    def third():
        assert goodput._running == 2  # this one and the one before
        return world.step()

    world.metrics.finished.put(None)  # or run() would wait forever
    goodput.run(third)
    world.spend(6)
    world.finish(goodput)
    world.spend(7)
    world.finish(goodput)
    world.spend(8)
    assert spent(goodput) == {"step": 18, "other": 8}
    goodput.drain()
    assert sum(goodput.durations()) == 18


def test_run_of_a_failing_step(world):
    goodput = world.process()

    def fails():
        world.spend(2)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        goodput.run(fails)
    world.spend(3)
    assert spent(goodput) == {"step": 2, "other": 3}


def test_run_real_step():
    step = jax.jit(lambda x: (x, {"loss": jnp.linalg.norm(x @ x @ x)}))
    x = jnp.ones((300, 300))
    step(x)
    with Goodput(None) as goodput:
        for _ in range(5):
            x, metrics = goodput.run(step, x)
        jax.device_get(metrics)
        goodput.drain()
        assert len(goodput.durations()) == 5
        assert 0 < goodput.row()["time/device_s"] < 1


def test_row_is_per_step_and_interval(world):
    goodput = world.process()
    with goodput("compile"):
        world.spend(100)
    assert goodput.row() == {"goodput": 0.0}
    world.spend(80)
    goodput.begin(0)  # earlier time is not part of a step's time
    for data in (1, 3):
        with goodput("data"):
            world.spend(data)
        with goodput("host"):
            world.spend(0.5)
        goodput.run(world.step)
        world.spend(10)
        world.finish(goodput)
    world.spend(3)
    with goodput("evaluate"):
        world.spend(32)
    times = {"time/device_s": 10.0, "time/data_s": 2.0, "time/host_s": 0.5, "time/step_s": 12.5 + 3 / 2}
    assert goodput.row() == {"goodput": 20 / 240} | times
    world.spend(10)
    assert goodput.row() == {"goodput": 20 / 250}


def steps(goodput, world, first, last, seconds):
    for step in range(first + 1, last + 1):
        goodput.run(world.step)
        world.spend(seconds)
        world.finish(goodput)
        if step % 10 == 0:
            goodput.write(step)


def test_account_of_three_starts(world, tmp_path):
    # 5 s to begin, then 2 s a step: a line at 10, 20, 30. Killed 1 s later.
    goodput = world.process(tmp_path, age=1.0, time=1.0)
    with goodput("restore"):
        world.spend(4)
    goodput.begin(0)
    steps(goodput, world, 0, 30, 2.0)
    world.spend(1)
    killed = goodput  # writes nothing more
    # Started 60 s later; the checkpoint was of step 15, half way between two lines.
    second = world.process(tmp_path, age=9.0, time=world.time + 60)
    with second("compile"):
        world.spend(6)
    second.begin(15)
    account = account_of(read_starts(tmp_path))
    assert account["lost"] == pytest.approx(15 * 2.0)
    assert account["step"] == pytest.approx(15 * 2.0)
    assert account["down"] == pytest.approx(1 + 60 - 9)
    # The process and the file agree.
    assert second.row()["goodput"] == pytest.approx(30.0 / sum(account.values()))
    steps(second, world, 15, 22, 3.0)
    second.write(22)
    # A third goes back behind both.
    third = world.process(tmp_path, time=world.time + 8)
    third.begin(5)
    steps(third, world, 5, 40, 1.0)
    with third("evaluate"):
        world.spend(6)
    with third("compile"):
        world.spend(4)
    third.close()
    account = account_of(read_starts(tmp_path))
    expected = {"step": 5 * 2 + 35, "lost": 25 * 2 + 7 * 3, "down": 52 + 8}
    expected |= {"compile": 6 + 4, "restore": 4, "evaluate": 6, "other": 1 + 9}
    assert {name: seconds for name, seconds in account.items() if seconds} == pytest.approx(expected)
    assert sum(account.values()) == pytest.approx(world.time)  # from the first start to the last line, nothing twice
    text = report(tmp_path)
    assert "3 starts, at step 40, 3 min 26 s" in text
    assert "goodput 21.8%" in text  # 45 / 206
    # 60 + 21 + 35 stepping and 6 evaluating, from each start's first step on.
    assert "not stepping, once compiled and restored: 4.9% (evaluate 4.9%)" in text
    killed.close()


def test_line_cut_off_by_a_kill(world, tmp_path):
    first = world.process(tmp_path)
    first.begin(0)
    steps(first, world, 0, 10, 1.0)
    with (tmp_path / FILE).open("a") as file:
        file.write('{"start": 0, "began": 10')
    second = world.process(tmp_path, time=world.time + 5)
    second.begin(10)
    steps(second, world, 10, 20, 1.0)
    second.close()
    assert [start.lines[0][0] for start in read_starts(tmp_path)] == [0, 10]
    lines = (tmp_path / FILE).read_text().splitlines()
    assert len(lines) == 3 + 4 and all(line.endswith("}") for line in lines)
    account = account_of(read_starts(tmp_path))
    assert (account["step"], account["lost"], account["down"]) == (20, 0, 5)


def test_start_that_ended_before_restoring(world, tmp_path):
    steps_done = world.process(tmp_path)
    steps_done.begin(0)
    steps(steps_done, world, 0, 10, 1.0)
    short = world.process(tmp_path, time=world.time + 5)
    world.spend(3)
    short.close()
    account = account_of(read_starts(tmp_path))
    assert (account["step"], account["other"], account["down"]) == (10, 3, 5)
    assert "2 starts, before its first step" in report(tmp_path)


def test_clock_set_back_makes_no_negative_time(tmp_path):
    for start, began in enumerate((1000.0, 900.0)):
        line = {"start": start, "began": began, "time": began + 10, "step": 0, "seconds": {"step": 0.0, "other": 10.0}}
        jsonl.append(tmp_path / FILE, line)
    assert account_of(read_starts(tmp_path))["down"] == 0.0


def test_account_in_memory_writes_nothing(world, tmp_path):
    goodput = world.process(None)
    goodput.begin(0)
    goodput.close()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match=r"holds no goodput\.jsonl"):
        report(tmp_path)


def test_lines_of_the_file(world, tmp_path):
    goodput = world.process(tmp_path, age=2.0)
    goodput.begin(0)
    goodput.close()
    lines = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert [line["step"] for line in lines] == [None, 0, 0]
    assert {line["start"] for line in lines} == {0}
    assert lines[0]["began"] == 998.0 and lines[0]["time"] == 1000.0


def test_process_age():
    assert 0.0 <= process_age() < 24 * 3600
