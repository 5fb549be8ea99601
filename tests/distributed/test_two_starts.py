"""Two starts of one run in real processes: exactly one trains. ``benchmarks/two_starts.py`` does this many times."""

import os

import pytest

from tests.support.benchmarks import run_benchmark
from tests.support.two_starts import CLOCK_S, KINDS, Kind, trial

QUICK = [
    Kind(),
    Kind(two_hosts=True, apart=True, clocks_s=CLOCK_S),
    Kind(killed=True),
    Kind(bucket=True, two_hosts=True, clocks_s=-CLOCK_S),
]


def run_trial(kind, request, tmp_path, settings=(0.5, 4.0)):
    run = f"{request.getfixturevalue('bucket')}/run" if kind.bucket else str(tmp_path / "run")
    return trial(kind, run, tmp_path / "scratch", 0, settings, dict(os.environ), longest_s=0.5)


@pytest.mark.parametrize("kind", QUICK, ids=str)
def test_one_of_two_starts_trains(kind, request, tmp_path):
    assert run_trial(kind, request, tmp_path).problems == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in QUICK], ids=str)
def test_one_of_two_starts_trains_in_every_situation(kind, request, tmp_path):
    assert run_trial(kind, request, tmp_path).problems == []


def test_trial_finds_a_start_that_takes_a_live_run_over(request, tmp_path):
    """Because it does not wait for a sign of life."""
    kind = Kind(two_hosts=True, apart=True)
    assert run_trial(kind, request, tmp_path, settings=(1000.0, -1.0)).problems


@pytest.mark.slow
def test_two_starts_benchmark(tmp_path):
    words = ("--trials=1", "--real=1", "--longest-s=1", "--renew-s=0.5", "--silent-s=4")
    result = run_benchmark("two_starts.py", tmp_path, *words)
    assert len(result["kinds"]) == len(KINDS) + 1 and result["problems"] == []
    assert all(kind["trials"] == kind["good"] == 1 for kind in result["kinds"].values())
