"""``phivision eval`` against an endpoint on loopback: results, resuming, shards, faults and refusals."""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from phivision_jax.cli import eval as eval_command
from phivision_jax.cli.main import main
from phivision_jax.evaluation.results import Result, load_results
from phivision_jax.inference import endpoint as endpoint_module
from tests.support.answers import serve_answers
from tests.support.commands import refused, run_command, succeeded
from tests.support.paths import ROOT
from tests.support.sums_benchmark import write_sums

SUMS = ROOT / "tests" / "support" / "sums_benchmark.py"
type Scores = dict[tuple[str, str, str], tuple[float, str]]


@pytest.fixture
def phivision(capsys):
    """Run a subcommand in this process; returns (exit code, output)."""
    return functools.partial(run_command, capsys)


@pytest.fixture
def sums(tmp_path) -> Path:
    write_sums(tmp_path / "sums.json", 40)
    return tmp_path / "sums.json"


@pytest.fixture(autouse=True)
def cache_of_the_test(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(endpoint_module, "_FIRST_WAIT_S", 0.01)


def words(url: str, sums: Path, out: Path, *more: str) -> list[str]:
    """Arguments of an evaluation of the sums in three modes."""
    asked = ["eval", f"--endpoint={url}", "--model=m", f"--benchmarks={SUMS}", f"--benchmark-data=sums={sums}"]
    return [*asked, "--modes=auto,think,nothink", f"--out={out}", *more]


def results(out: Path) -> list[Result]:
    return load_results(out)[1]


def scores(found: list[Result]) -> Scores:
    """Value and answer of each item and mode, each of which must have one row."""
    assert len({result.key for result in found}) == len(found)
    return {result.key: (result.value, result.answer) for result in found}


def test_results_and_reports(phivision, sums, tmp_path):
    with serve_answers() as (url, received):
        text = succeeded(phivision(*words(url, sums, out := tmp_path / "out")))
    assert len(scores(results(out))) == 120 == len(received)
    report = json.loads((out / "report.json").read_text())
    modes = {each["mode"]: each for each in report["summaries"]}
    assert list(modes) == ["auto", "think", "nothink"] and modes["auto"]["figures"] == {"score": 100.0}
    assert modes["nothink"]["figures"]["score"] == 65.0 and modes["nothink"]["judge"] == "rule only"
    table = (out / "report.md").read_text()
    assert "| Sums | nothink | rule only (published with a judge) | 65.0 |" in table and (out / "report.html").exists()
    assert "65.0" in text and "Traceback" not in text
    names = {result.images[0] for result in results(out)}
    assert {path.name for path in (out / "images").iterdir()} == names and len(names) == 10


def test_finished_evaluation_asks_nothing(phivision, sums, tmp_path):
    with serve_answers() as (url, received):
        command = words(url, sums, out := tmp_path / "out", "--no-cache")
        succeeded(phivision(*command))
        before = (out / "results-0.jsonl").read_text()
        succeeded(phivision(*command))
    assert len(received) == 120 and (out / "results-0.jsonl").read_text() == before


def test_replies_are_cached_for_other_directories(phivision, sums, tmp_path):
    with serve_answers() as (url, received):
        for name, asked in (("one", 120), ("two", 120)):
            succeeded(phivision(*words(url, sums, tmp_path / name)))
            assert len(received) == asked
        succeeded(phivision(*words(url, sums, tmp_path / "three", "--max-new-tokens=4")))
        assert len(received) == 240
        succeeded(phivision(*words(url, sums, tmp_path / "four", "--no-cache")))
        assert len(received) == 360
    assert all(result.cached for result in results(tmp_path / "two"))
    assert scores(results(tmp_path / "one")) == scores(results(tmp_path / "two"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("--modes=auto", "modes"),
        ("--max-new-tokens=4", "sampling.max_new_tokens was null"),
        ("--limit=10", "benchmarks.sums.items was 40, is 10"),
        ("--model=other", "model was"),
        ("--shard=0/2", "shards was 1, is 2"),
    ],
)
def test_other_settings_are_refused(phivision, sums, tmp_path, change, named):
    with serve_answers() as (url, received):
        succeeded(phivision(*words(url, sums, out := tmp_path / "out")))
        named = named.replace("null", "None")
        refused(phivision(*words(url, sums, out), change), "other settings", named, "--restart", code=1)
        assert len(received) == 120
        succeeded(phivision(*words(url, sums, out), change, "--restart"))
    assert load_results(out)[0]["shards"] == (2 if "shard" in change else 1)


def test_changed_data_set_is_refused(phivision, sums, tmp_path):
    with serve_answers() as (url, _):
        succeeded(phivision(*words(url, sums, out := tmp_path / "out")))
        rows = json.loads(sums.read_text())
        rows[7][2] += 100  # another image, the same question and answer
        sums.write_text(json.dumps(rows))
        refused(phivision(*words(url, sums, out)), "the data of sums has changed", code=1)


def test_shards_write_one_evaluation(phivision, sums, tmp_path):
    with serve_answers() as (url, received):
        succeeded(phivision(*words(url, sums, tmp_path / "one", "--no-cache")))
        text = succeeded(phivision(*words(url, sums, tmp_path / "out", "--shard=2/3", "--no-cache")))
        assert "42 of 120 results: other shards have not finished" in text
        for i in (0, 1):
            succeeded(phivision(*words(url, sums, tmp_path / "out", f"--shard={i}/3", "--no-cache")))
        assert len(received) == 240
    assert scores(results(tmp_path / "one")) == scores(results(tmp_path / "out"))
    assert len(list((tmp_path / "out").glob("results-*.jsonl"))) == 3
    reports = [json.loads((tmp_path / name / "report.json").read_text())["summaries"] for name in ("one", "out")]
    assert [each["figures"] for each in reports[0]] == [each["figures"] for each in reports[1]]


def test_a_shard_has_one_writer(phivision, sums, tmp_path):
    with serve_answers(seconds=0.05) as (url, _):
        process = subprocess.Popen(
            [sys.executable, "eval.py", *words(url, sums, tmp_path / "out", "--parallel=1")[1:]],
            cwd=ROOT,
            env=os.environ,
        )
        wait_for(lambda: (tmp_path / "out" / "results-0.jsonl").exists(), process)
        refused(phivision(*words(url, sums, tmp_path / "out")), "another process writes shard 0", code=1)
        process.kill()
        process.wait()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_evaluation_continues(phivision, sums, tmp_path, kills):
    """Each item once, and the scores of an undisturbed run, wherever the kills come."""
    rng, out, moments = random.Random(time.time_ns()), tmp_path / "out", list[float]()
    with serve_answers(seconds=0.02) as (url, received):
        succeeded(phivision(*words(url, sums, tmp_path / "undisturbed", "--no-cache")))
        asked = len(received)
        command = [sys.executable, "eval.py", *words(url, sums, out, "--no-cache", "--parallel=2")[1:]]
        for _ in range(kills):
            before = len(received)
            process = subprocess.Popen(command, cwd=ROOT, env=os.environ, stdout=subprocess.DEVNULL)
            # A tenth of the calls after the first of this start, so that none finishes.
            calls, moments = rng.randrange(1, 110 // kills), [*moments, rng.random() / 50]
            wait_for(lambda before=before, calls=calls: len(received) >= before + calls, process)
            time.sleep(moments[-1])
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
        done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        # Calls in flight, and one whose reply was not yet written, are repeated.
        assert len(received) - asked <= 120 + 3 * kills
    assert scores(results(out)) == scores(results(tmp_path / "undisturbed")), moments
    lines = [json.loads(line) for line in (out / "results-0.jsonl").read_text().splitlines()]
    assert len(lines) == 120


def fault(number: int) -> str:
    """10 % of the calls fail, 5 % are silent, 3 % answer garbage, at random."""
    chance = random.Random(number).random()
    return "fail" if chance < 0.1 else "silent" if chance < 0.15 else "garbage" if chance < 0.18 else ""


def test_faulty_endpoint_leaves_no_item_out(phivision, sums, tmp_path):
    faulty = ["--timeout=0.3", "--no-cache", "--parallel=16"]
    with serve_answers(faults=fault, silence=0.6) as (url, received):
        command = words(url, sums, out := tmp_path / "out", *faulty, "--attempts=1")
        text = succeeded(phivision(*command))
        found = results(out)
        failed = [result for result in found if result.failed]
        assert len(scores(found)) == 120 == len(received)
        assert len(failed) == sum(bool(fault(number)) for number in range(120)) > 10
        kinds = ("status 503", "timed out", "does not have the form of OpenAI's API")
        assert all(any(kind in result.error for result in failed) for kind in kinds)
        assert f"sums: {len(failed)} of 120 failed, as " in text
        assert all(result.value == 0 for result in failed)
        # Started again, it asks what has failed; several attempts at each succeed.
        succeeded(phivision(*command[:-1], "--attempts=8"))
        assert not any(result.failed for result in results(out)) and len(scores(results(out))) == 120


def test_judge_and_its_key(phivision, sums, tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "secret")
    with serve_answers() as (url, _), serve_answers(lambda text, mode: "yes") as (judge_url, judged):
        command = words(url, sums, out := tmp_path / "out", f"--judge={judge_url}", "--judge-model=j")
        succeeded(phivision(*command))
    assert 0 < len(judged) <= 30 and {result.judge for result in results(out)} == {"", "j"}
    report = json.loads((out / "report.json").read_text())
    assert {each["judge"] for each in report["summaries"]} == {"j"}
    assert not any("secret" in path.read_text() for path in out.glob("*.json*"))


def test_cost_is_measured_one_at_a_time_after_warming_up(phivision, sums, tmp_path):
    with serve_answers() as (url, received):
        command = words(url, sums, out := tmp_path / "out", "--cost", "--limit=9")
        text = succeeded(phivision(*command))
        assert len(received) == 3 + 27
        succeeded(phivision(*command))  # finished: nothing is asked
        assert len(received) == 30
    costs = json.loads((out / "cost.json").read_text())["costs"]
    assert [(each["mode"], each["items"], each["output_tokens"]) for each in costs] == [
        (mode, 9, 2.0) for mode in ("auto", "think", "nothink")
    ]
    assert not any(result.cached for result in results(out)) and "Sums" in text


class Stop(Exception):
    pass


@pytest.mark.parametrize(
    ("given", "slots", "limit"),
    [
        ([], 0, None),
        (["--config=configs/tiny.py"], 64, 8),
        (["--config=configs/tiny.py", "--set", "max_new_tokens=2", "eval_batch=4"], 4, 2),
        (["--config=configs/tiny.py", "--max-new-tokens=3", "--slots=5"], 5, 3),
    ],
)
def test_settings_of_a_configuration(sums, monkeypatch, given, slots, limit):
    received = {}

    class Model(eval_command.LocalModel):
        def __init__(self, checkpoint, local, slots):
            received.update(checkpoint=checkpoint, slots=local.slots or slots, weights=local.weights, mesh=local.mesh)

        def measure(self, request):
            received.update(limit=request.max_new_tokens)
            raise Stop

    monkeypatch.setattr(eval_command, "LocalModel", Model)
    words = ["eval", "run", f"--benchmarks={SUMS}", f"--benchmark-data={sums}", "--weights=int8", "--mesh", "fsdp", "4"]
    with pytest.raises(Stop):
        main([*words, *given])
    assert received.pop("limit") == (limit or 8)  # of the benchmark
    assert received == {"checkpoint": "run", "slots": slots, "weights": "int8", "mesh": {"fsdp": 4}}


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (["run", "--endpoint=http://x", "--model=m"], "give a CHECKPOINT, or --endpoint=URL"),
        ([], "give a CHECKPOINT, or --endpoint=URL"),
        (["run"], "nothing to score: give --benchmarks or --data"),
        (["--endpoint=http://x", f"--benchmarks={SUMS}", "--benchmark-data=sums=nowhere"], "nowhere does not exist"),
        (["run", "--benchmarks=chartq"], "chartqa"),
        (["run", f"--benchmarks={SUMS},{SUMS}"], "named twice: sums"),
        (["run", "--modes=thin"], "did you mean 'think'?"),
        (["run", "--modes=auto,auto"], "auto is given twice"),
        (["run", "--shard=4/4"], "from 0/N to N-1/N"),
        (["run", f"--benchmarks={SUMS}", "--benchmark-data=sums=SUMS", "--judge=http://x"], "a judge needs both"),
        (["--endpoint=http://x", f"--benchmarks={SUMS}", "--benchmark-data=sums=SUMS"], "give --model=NAME"),
    ],
)
def test_mistakes_are_refused_before_anything_is_loaded(phivision, sums, given, problem):
    refused(phivision("eval", *(word.replace("SUMS", str(sums)) for word in given)), problem, code=1)
