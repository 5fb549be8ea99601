from __future__ import annotations

import json

import pytest

from phivision_jax.data.quarantine import Quarantined, RunLog, TooManyBadRecords


def bad(i: int, reason="image-broken") -> Quarantined:
    return Quarantined(f"r{i}", "photos", reason, "cut short", f"photos, record {i}")


def test_run_log_stops_with_summary(tmp_path):
    log = RunLog(tmp_path / "q.jsonl", 0.002)
    log.add([bad(0), bad(1, "role")], 1000)  # exactly the share passes
    with pytest.raises(TooManyBadRecords) as error:
        log.add([bad(2)], 0)
    lines = str(error.value).splitlines()
    assert "3 of 1,000 records are bad, more than the 0.20%" in lines[0] and "q.jsonl lists them" in lines[0]
    assert lines[1].split()[:2] == ["2", "image-broken"] and "'r0': cut short" in lines[1]
    assert lines[2].split()[:2] == ["1", "role"]


def test_run_log_lists_each_record_once(tmp_path, caplog):
    file = tmp_path / "quarantine.jsonl"
    log = RunLog(file, 0.5)
    log.add([bad(1), bad(2)], 100)
    log.add([bad(1)], 100)
    assert log.failed == 3
    with file.open("a") as lines:
        lines.write('{"id": "r9", "sou')  # killed here
    again = RunLog(file, 0.5)
    again.add([bad(2), bad(3)], 100)
    named = [json.loads(line)["id"] for line in file.read_text().splitlines()]
    assert named == ["r1", "r2", "r3"]
    assert "record 'r1' of 'photos' failed (image-broken): cut short" in caplog.text


def test_run_log_stops_at_share_of_first_thousand(tmp_path):
    log = RunLog(tmp_path / "quarantine.jsonl", 0.01)
    log.add([bad(i) for i in range(10)], 20)  # half of twenty, but 1 % of the first thousand
    with pytest.raises(TooManyBadRecords, match="11 of 1,000"):
        log.add([bad(10)], 20)


def test_run_log_logs_only_first_records(tmp_path, caplog):
    RunLog(tmp_path / "q.jsonl", 1.0).add([bad(i) for i in range(50)], 1000)
    assert caplog.text.count("failed (image-broken)") == 10 and caplog.text.count("are only listed in") == 1
