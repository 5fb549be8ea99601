"""A disk that is full is named by a file on it."""

import errno
import subprocess
import sys

import pytest

from phivision_jax.io.file_errors import naming
from tests.support.launched import ENVIRONMENT, ROOT

SCRIPT = """
import sys
from pathlib import Path
from phivision_jax.training.telemetry.goodput_report import append_line
from phivision_jax.training.guard import SkippedSteps
from phivision_jax.training.telemetry.metrics import MetricsWriter
from phivision_jax.training.telemetry.record_log import RecordLog
import resource

run = Path(sys.argv[1])
writer, log = MetricsWriter(run), RecordLog(run, 0, 0)
skipped = SkippedSteps(run, 8)
metrics = {"loss": float("nan"), "grad_norm": 1.0, "skipped_in_a_row": 1}
resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
for write in (
    lambda: writer.write(1, {"loss": 1.0}),
    lambda: log.write(1, [["a"]]),
    lambda: skipped.take(1, metrics, [["a"]]),
    lambda: append_line(run, {"start": 0}),
):
    try:
        write()
        print("written")
    except OSError as error:
        print(error)
"""


def test_whatever_a_step_writes_names_its_file(tmp_path):
    """Files may not grow: the error comes when they are flushed or closed, and by itself names none."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
    )
    files = ("metrics.jsonl", "records_0.jsonl", "skipped.jsonl", "goodput.jsonl")
    said = [line for line in done.stdout.splitlines() if line.startswith(("[Errno", "written"))]
    assert said == [f"[Errno 27] File too large: '{tmp_path / name}'" for name in files], done.stderr


def test_what_names_a_file_keeps_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"), naming(tmp_path / "other"):
        (tmp_path / "nowhere").read_text()
    with pytest.raises(PermissionError, match=r"^\[Errno 13\] no: '.*/other'$") as told, naming(tmp_path / "other"):
        raise OSError(errno.EACCES, "no")
    assert isinstance(told.value.__cause__, PermissionError)
    with pytest.raises(OSError, match=r"^only words$"), naming(tmp_path / "other"):
        raise OSError("only words")
