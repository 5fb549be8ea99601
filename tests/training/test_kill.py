"""A run that is killed and stopped reaches the numbers of an undisturbed one, and the comparison is sensitive."""

import shutil
import signal

import pytest

from phivision_jax.training.telemetry.metrics import FILE
from tests.support.benchmarks import run_benchmark
from tests.support.disturbed import Disturbance, DisturbedRun, differences, left_over, sample_disturbances
from tests.support.launched import ENVIRONMENT, stand_in

STEPS = 80


def test_sample_disturbances():
    sampled = sample_disturbances(100, 20, 2, seed=0)
    assert sampled == sample_disturbances(100, 20, 2, seed=0) != sample_disturbances(100, 20, 2, seed=1)
    assert [d.signal for d in sampled].count(signal.SIGKILL) == 100 and len(sampled) == 120
    assert {d.process for d in sampled} == {0, 1} and 5 < sum(d.starting for d in sampled) < 50


def test_killed_and_stopped_run_equals_undisturbed(tmp_path, monkeypatch):
    """Two processes; one is killed, then one receives SIGTERM, between two checkpoints."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    runs = [tmp_path / "calm", tmp_path / "wild"]

    def start(run, *more):
        return DisturbedRun(stand_in(run, f"--steps={STEPS}", *more), run, 2, STEPS, 5, run.with_suffix(".log"))

    undisturbed = start(runs[0])
    calm = undisturbed.undisturbed()
    assert calm.code == 0 and calm.starts == 1, undisturbed.log.read_text()
    disturbances = [Disturbance(signal.SIGKILL, 1, False, 0.2, 0.01), Disturbance(signal.SIGTERM, 0, False, 0.1, 0.0)]
    disturbed = start(runs[1], "--pause=0.05")
    wild = disturbed.disturbed(disturbances, calm.starting_s)
    assert (wild.code, wild.starts) == (0, 3), disturbed.log.read_text()
    assert wild.sent == {"SIGKILL": 1, "SIGTERM": 1}
    assert differences(runs[0], runs[1], 2) == {} and left_over(runs[0], runs[1]) == []

    # Planted differences are found.
    for name, edit in ((FILE, '"loss": 1'), ("records_1.jsonl", "synthetic:1")):
        other = tmp_path / name
        shutil.copytree(runs[1], other)
        text = (other / name).read_text()
        assert edit in text or name == FILE
        lines = text.splitlines()
        lines[60] = lines[61].replace('"step": 62', '"step": 61')
        (other / name).write_text("\n".join(lines) + "\n")
        found = differences(runs[0], other, 2)
        assert len(found) == 1 and "61" in next(iter(found.values()))
    (runs[1] / "stray").touch()
    assert left_over(runs[0], runs[1]) == ["stray"]
    # A checkpoint saved on SIGTERM may replace another one, but not be an additional one.
    newest = max((runs[1] / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    (runs[1] / "checkpoints" / "99999").mkdir()
    assert left_over(runs[0], runs[1]) == ["checkpoints/99999", "stray"]
    shutil.rmtree(newest)
    assert left_over(runs[0], runs[1]) == ["stray"]


@pytest.mark.slow
def test_kill_benchmark(data, tmp_path):
    """The benchmark itself, with one kill and one SIGTERM."""
    words = ("--kills=1", "--terms=1", "--steps=50", f"--data={data}")
    result = run_benchmark("kill.py", tmp_path, *words)
    assert result["disturbed"]["sent"] == {"SIGKILL": 1, "SIGTERM": 1} and result["disturbed"]["starts"] == 3
    assert result["differences"] == {} and result["left_over"] == []
