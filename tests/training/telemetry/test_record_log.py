"""What processes log by step goes back with the checkpoint, whoever goes on."""

import json

import pytest

from phivision_jax.training.telemetry.record_log import RecordLog, cut_all


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@pytest.fixture
def run(tmp_path):
    """Two processes have trained 5 steps and skipped the second and the fourth; both were killed while writing."""
    for process in (0, 1):
        log = RecordLog(tmp_path, process, 0)
        for step in range(1, 6):
            log.write(step, [[f"a/{step}"], ["ä"]])
        log.close()
    for name in ("skipped.jsonl", "skipped_1.jsonl"):
        lines = (json.dumps({"step": step, "rows": [["ä"]]}, ensure_ascii=False) + "\n" for step in (2, 4))
        (tmp_path / name).write_text("".join(lines), encoding="utf-8")
    for path in tmp_path.iterdir():
        with path.open("ab") as file:
            file.write('{"step": 1, "ids": [["ä'.encode()[:-1])  # in the middle of a letter
    (tmp_path / "metrics.jsonl").write_text("not its business")
    return tmp_path


@pytest.mark.parametrize("at", [0, 3, 5])
def test_one_process_goes_on_with_the_logs_of_two(run, at):
    cut_all(run, at)
    for process in (0, 1):
        assert steps(run / f"records_{process}.jsonl") == list(range(1, at + 1))
    for name in ("skipped.jsonl", "skipped_1.jsonl"):
        assert steps(run / name) == [step for step in (2, 4) if step <= at]
    assert (run / "metrics.jsonl").read_text() == "not its business"
    assert {path.suffix for path in run.iterdir()} == {".jsonl"}


def test_a_run_without_logs(tmp_path):
    cut_all(tmp_path, 3)
    assert not list(tmp_path.iterdir())
