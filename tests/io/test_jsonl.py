"""JSONL logs: lines after a step are dropped, lines that a kill cut short are ignored and removed."""

import contextlib
import itertools
import json
import math
import random
import subprocess
import sys

from phivision_jax.data import quarantine
from phivision_jax.io import jsonl, storage
from phivision_jax.training.run import truncate_logs
from phivision_jax.training.telemetry import goodput, metrics
from tests.support.launched import ENVIRONMENT, ROOT
from tests.support.mutations import damage_bytes

SCRIPT = """
import sys
from pathlib import Path
from phivision_jax.io import jsonl
from phivision_jax.training.guard import SkippedUpdates
from phivision_jax.training.telemetry.goodput import Goodput
from phivision_jax.training.telemetry.metrics import MetricsWriter
import resource

run = Path(sys.argv[1])
writer, goodput = MetricsWriter(run), Goodput(run)
skipped = SkippedUpdates(run, 8)
metrics = {"loss": float("nan"), "weight": 1.0, "grad_norm": 1.0, "skipped_in_a_row": 1}
resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
for write in (
    lambda: writer.write(1, {"loss": 1.0}),
    lambda: jsonl.append(run / "records_0.jsonl", {"step": 1, "ids": [["a"]]}),
    lambda: skipped.add(1, metrics, [["a"]]),
    lambda: goodput.write(1),
):
    try:
        write()
        print("written")
    except OSError as error:
        print(error)
"""


def rows(steps):
    return [{"step": step, "text": f"é\n{step}"} for step in steps]


def test_append_and_read(tmp_path):
    assert jsonl.read(tmp_path / "a") == []
    for row in rows(range(3)):
        jsonl.append(tmp_path / "a", row)
    assert jsonl.read(tmp_path / "a") == rows(range(3))
    assert len((tmp_path / "a").read_text().splitlines()) == 3
    jsonl.append(tmp_path / "b", {"id": "\udc80"})  # a lone surrogate is written as its escape
    assert jsonl.read(tmp_path / "b") == [{"id": "\udc80"}]


def test_torn_last_line_is_ignored_then_removed(tmp_path):
    path = tmp_path / "a"
    jsonl.append(path, {"step": 1})
    complete = json.dumps({"step": 2}).encode()
    for length in range(1, len(complete) + 1):  # even the complete text does not count without its newline
        path.write_bytes(b'{"step": 1}\n' + complete[:length])
        assert jsonl.read(path) == [{"step": 1}]
        jsonl.append(path, {"step": 3})
        assert path.read_bytes() == b'{"step": 1}\n{"step": 3}\n'


def test_read_ignores_lines_that_are_not_objects(tmp_path):
    (tmp_path / "a").write_bytes(b'{"step": 1}\n\0\0\0\n3\n{"step": 2}\n')
    assert jsonl.read(tmp_path / "a") == [{"step": 1}, {"step": 2}]


def test_truncate_drops_later_steps(tmp_path):
    path = tmp_path / "a"
    assert jsonl.truncate(path, 3) == [] and not path.exists()
    for row in rows(range(5)):
        jsonl.append(path, row)
    before = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(path.read_bytes() + b'{"step": 0, "te')
    assert jsonl.truncate(path, 2) == rows(range(3))
    assert path.read_bytes() == b"".join(before[:3])


def test_read_in_bucket(bucket):
    path = storage.location(bucket) / "a.jsonl"
    assert jsonl.read(path) == []
    path.write_text('{"a": 1}\n{"a"')
    assert jsonl.read(path) == [{"a": 1}]


def test_full_disk_error_names_the_log(tmp_path):
    """The limit on file sizes strikes when a line is flushed; that error by itself names no file."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
    )
    files = ("metrics.jsonl", "records_0.jsonl", "skipped.jsonl", "goodput.jsonl")
    printed = [line for line in done.stdout.splitlines() if line.startswith(("[Errno", "written"))]
    assert printed == [f"[Errno 27] File too large: '{tmp_path / name}'" for name in files], done.stderr


def test_nuls_are_dropped_as_a_torn_line_is(tmp_path):
    """A power cut may leave NULs where the file was enlarged but not written."""
    path, row = tmp_path / "a", b'{"step": 1}\n'
    path.write_bytes(row + bytes(4096))
    assert jsonl.read(path) == [{"step": 1}]
    jsonl.append(path, {"step": 2})
    assert path.read_bytes() == row + b'{"step": 2}\n'
    path.write_bytes(bytes(100) + row + bytes(100) + b"\n" + bytes(7) + b'{"step": 2}\n' + row[:5] + bytes(9))
    assert jsonl.truncate(path, 9) == [{"step": 1}, {"step": 2}]
    assert path.read_bytes() == row + b'{"step": 2}\n'


def test_rows_of_the_wrong_kind_are_ignored(tmp_path):
    path = tmp_path / "a"
    wrong = ['{"steps": 1}', '{"step": "1"}', '{"step": true}', '{"step": 1.5}', '{"step": -1}', "[" * 100_000, "1"]
    path.write_text("".join(f"{line}\n" for line in [*wrong, '{"step": 7}', f'{{"step": {"9" * 5000}}}']))
    assert jsonl.read(path, step=int) == [{"step": 7}] == jsonl.truncate(path, 8)
    path.write_text('{"time": NaN}\n{"time": 1e999}\n{"time": "1"}\n{"time": 3}\n{"time": 2.5}\n{"time": null}\n')
    assert jsonl.read(path, time=float) == [{"time": 3}, {"time": 2.5}]
    assert jsonl.read(path, time=str) == [{"time": "1"}]


def test_mutated_logs_are_read_without_an_error(tmp_path):
    """All readers of a run's logs, over 2,000 mutations."""
    seconds = {name: 1.5 for name in goodput.MEANING if name not in ("lost", "down")}
    lines = {
        goodput.FILE: [
            {"start": i // 3, "began": 1e9 + i, "time": 1e9 + i, "step": i % 3 or None, "seconds": seconds}
            for i in range(6)
        ],
        metrics.FILE: [{"step": i, "loss": 1.5, "elapsed_s": 2.0 * i} for i in range(5)],
        "records_0.jsonl": [{"step": i, "ids": [["a", "b"], ["c"]]} for i in range(5)],
        quarantine.FILE: [
            {"id": str(i), "source": "s", "reason": "fields", "detail": "d", "where": "w"} for i in range(4)
        ],
    }
    sound = {name: "".join(json.dumps(row) + "\n" for row in rows).encode() for name, rows in lines.items()}
    for i, (name, content) in zip(range(2_000), itertools.cycle(sound.items())):
        (tmp_path / name).write_bytes(damage_bytes(content, random.Random(i)))
        if name == goodput.FILE:
            goodput.account_of(goodput.read_starts(tmp_path))
            with contextlib.suppress(ValueError):  # no line is left
                goodput.report(tmp_path)
        elif name == metrics.FILE:
            assert math.isfinite(sum(sum(row.values()) for row in metrics.read_metrics(tmp_path)))
        elif name == quarantine.FILE:
            quarantine.RunLog(tmp_path / name, 0.01)
            quarantine.TooManyBadRecords.summarise(1, 2, 0.1, tmp_path / name)
        else:
            truncate_logs(tmp_path, 3)
