"""Traces of the configured steps, and of those after a slow one, once."""

import jax
import jax.numpy as jnp
import pytest

from phivision_jax.training.telemetry.profiling import Profiler, parse_steps


class Calls:
    def __init__(self, tmp_path, monkeypatch, **settings):
        self.log, self.messages = [], []

        def start(path):
            self.log.append(f"start {path.removeprefix(str(tmp_path))}")

        monkeypatch.setattr(jax.profiler, "start_trace", start)
        monkeypatch.setattr(jax.profiler, "stop_trace", lambda: self.log.append("stop"))
        self.profiler = Profiler(tmp_path, log=self.messages.append, **settings)

    def steps(self, first, last, seconds=1.0):
        for step in range(first, last + 1):
            self.profiler.before(step, lambda: self.log.append("drain"), [seconds])
            self.log.append(step)

    def close(self):
        self.profiler.close(lambda: self.log.append("drain"))


def test_profiler_traces_configured_steps(tmp_path, monkeypatch):
    calls = Calls(tmp_path, monkeypatch, profile="3:5")
    calls.steps(1, 6)
    calls.close()
    assert calls.log == [1, 2, "drain", "start /profile/3", 3, 4, "drain", "stop", 5, 6]
    assert "xprof --logdir=" in calls.messages[0] and str(tmp_path / "profile" / "3") in calls.messages[0]


def test_profiler_when_the_run_is_within_the_steps(tmp_path, monkeypatch):
    calls = Calls(tmp_path, monkeypatch, profile="3:9")
    calls.steps(5, 6)
    calls.close()
    assert calls.log == ["drain", "start /profile/5", 5, 6, "drain", "stop"]


def test_profiler_traces_after_a_slow_step_once(tmp_path, monkeypatch):
    calls = Calls(tmp_path, monkeypatch, slow_step=2.0)
    calls.profiler.before(1, lambda: None, [0.1, 100.0])  # before there is a median
    calls.steps(2, 11, 1.0)
    assert "stop" not in calls.log and calls.messages == []
    calls.steps(12, 12, 2.0)  # not more than twice
    calls.log.clear()
    calls.steps(13, 13, 2.1)
    calls.steps(14, 20, 9.0)
    assert calls.log == ["drain", "start /profile/13", 13, 14, 15, "drain", "stop", *range(16, 21)]
    assert calls.messages[0] == "a step took 2.1 s, the median is 1 s: tracing the next 3"


def test_profiler_ignores_slow_steps_by_default(tmp_path, monkeypatch):
    calls = Calls(tmp_path, monkeypatch)
    calls.steps(1, 20, 1.0)
    calls.steps(21, 22, 50.0)
    assert calls.log == list(range(1, 23))


@pytest.mark.parametrize("text", ["100", "100-103", "a:b", "5:5", "7:5", "0:3", "-1:3", ":", "1:2:3", " 1:2"])
def test_parse_steps_refuses(text, tmp_path):
    with pytest.raises(ValueError, match="give FIRST:END"):
        parse_steps(text)
    with pytest.raises(ValueError, match="FIRST:END"):
        Profiler(tmp_path, text)


def test_profiler_refuses_slow_step(tmp_path):
    for factor in (0.5, 1.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="slow_step is"):
            Profiler(tmp_path, slow_step=factor)
    assert list(parse_steps("")) == [] and list(parse_steps("100:103")) == [100, 101, 102]


def test_profiler_writes_a_trace(tmp_path):
    profiler = Profiler(tmp_path, "2:3")
    for step in (1, 2, 3):
        profiler.before(step, lambda: None)
        (jnp.ones((64, 64)) @ jnp.ones((64, 64))).block_until_ready()
    profiler.close(lambda: None)
    found = list((tmp_path / "profile" / "2").rglob("*.xplane.pb"))
    assert len(found) == 1 and found[0].stat().st_size > 1000
    assert jax.profiler.ProfileData.from_file(str(found[0])) is not None
