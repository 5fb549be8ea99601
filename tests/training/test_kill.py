"""Killed and told to stop, a training comes to the numbers of one that was left alone."""

import json
import shutil
import signal
import subprocess
import sys

import pytest

from benchmarks import kill
from benchmarks.kill import Disturbance, Training, differences, draw, left_over
from phivision_jax.training.telemetry import record_log
from phivision_jax.training.telemetry.metrics import FILE
from phivision_jax.training.telemetry.record_log import RecordLog
from tests.support.launched import ENVIRONMENT, ROOT, stand_in
from tests.training.test_train import data  # noqa: F401  (a fixture)

STEPS = 80


def test_what_is_drawn():
    drawn = draw(100, 20, 2, seed=0)
    assert drawn == draw(100, 20, 2, seed=0) != draw(100, 20, 2, seed=1)
    assert [d.signal for d in drawn].count(signal.SIGKILL) == 100 and len(drawn) == 120
    assert {d.process for d in drawn} == {0, 1} and 5 < sum(d.starting for d in drawn) < 50


def test_records_of_lost_steps_are_dropped(tmp_path):
    log = RecordLog(tmp_path, 3, 0)
    for step in range(1, 6):
        log.write(step, [["a/1", "ä/2"], [str(step)]])
    log.close()
    path = record_log.path_of(tmp_path, 3)
    with path.open("ab") as file:  # killed while writing
        file.write(b'{"step": 6, "i')
    log = RecordLog(tmp_path, 3, 4)
    log.write(5, [["b"]])
    log.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[3]["ids"] == [["a/1", "ä/2"], ["4"]] and rows[4]["ids"] == [["b"]]
    RecordLog(tmp_path, 3, 0).close()
    assert path.read_bytes() == b""


def test_killed_and_told_to_stop(tmp_path, monkeypatch):
    """Two processes; one is killed, then one is told to stop, between two checkpoints."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(kill, "EVERY", 5)
    runs = [tmp_path / "calm", tmp_path / "wild"]
    training = Training(stand_in(runs[0], f"--steps={STEPS}"), runs[0], 2, STEPS, runs[0].with_suffix(".log"))
    calm = training.undisturbed()
    assert calm.code == 0 and calm.starts == 1, training.log.read_text()
    disturbances = [Disturbance(signal.SIGKILL, 1, False, 0.2, 0.01), Disturbance(signal.SIGTERM, 0, False, 0.1, 0.0)]
    training = Training(
        stand_in(runs[1], f"--steps={STEPS}", "--pause=0.05"), runs[1], 2, STEPS, runs[1].with_suffix(".log")
    )
    wild = training.disturbed(disturbances, calm.starting_s)
    assert (wild.code, wild.starts) == (0, 3), training.log.read_text()
    assert wild.sent == {"SIGKILL": 1, "SIGTERM": 1}
    assert differences(runs[0], runs[1], 2) == {} and left_over(runs[0], runs[1]) == []

    # What would be found if it were otherwise.
    for name, edit in ((FILE, '"loss": 1'), ("records_1.jsonl", "made:1")):
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
    # A checkpoint saved on SIGTERM may take the place of another one, but not lie beside as many.
    newest = max((runs[1] / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    (runs[1] / "checkpoints" / "99999").mkdir()
    assert left_over(runs[0], runs[1]) == ["checkpoints/99999", "stray"]
    shutil.rmtree(newest)
    assert left_over(runs[0], runs[1]) == ["stray"]


@pytest.mark.slow
def test_the_script_in_little(data, tmp_path):  # noqa: F811
    """train.py itself, killed once and told to stop once."""
    out = tmp_path / "kill.json"
    words = ["--kills=1", "--terms=1", "--steps=50", f"--data={data}", f"--work={tmp_path / 'work'}", f"--out={out}"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "kill.py"), *words],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(out.read_text())
    assert told["disturbed"]["sent"] == {"SIGKILL": 1, "SIGTERM": 1} and told["disturbed"]["starts"] == 3
    assert told["differences"] == {} and told["left_over"] == []
