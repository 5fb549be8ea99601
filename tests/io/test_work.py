"""The work engine with a toy step: the same files after any kill and with any number of workers."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from phivision_jax.io import retry, work
from phivision_jax.io.work import Summary, Work

N, CHUNK = 25, 4


class Numbers:
    """The numbers below N. Reading item ``bad`` ends in ``kill`` (SIGKILL) or ``error`` until ``once`` exists."""

    name = "numbers"

    def __init__(self, mishap: str = "", bad: int = -1, once: Path | None = None) -> None:
        self._mishap, self._bad, self._once = mishap, bad, once

    def __len__(self) -> int:
        return N

    def key(self) -> Any:
        return N

    def read(self, start: int, stop: int) -> Iterator[int]:
        for i in range(start, stop):
            if i == self._bad and self._once is not None and not self._once.exists():
                self._once.touch()
                if self._mishap == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise OSError(5, "Input/output error")
            yield i


def repeat(item: int) -> Iterator[str]:
    """Toy step: item i gives i mod 3 results, each with its lineage."""
    for k in range(item % 3):
        yield f"repeat: {item}, copy {k}"


class Lines:
    """Toy sink: one line per result."""

    def __init__(self, folder: Path, chunk: str) -> None:
        self._name, self._lines = f"lines-{chunk}.txt", []
        self._path = folder / self._name

    def add(self, result: str) -> None:
        self._lines.append(result)

    def close(self) -> Summary:
        if self._lines:
            self._path.write_text("\n".join(self._lines) + "\n")
        return {"file": self._name if self._lines else None, "lines": len(self._lines)}


def finish(directory: Path, summaries: Callable[[], Iterator[Summary]]) -> None:
    (directory / "all.json").write_text(json.dumps(list(summaries())))


def toy(source: Numbers, step: Callable[[int], Iterator[str]] = repeat, **settings: Any) -> Work[int, str]:
    return Work(source, step, Lines, settings, CHUNK)


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("work") / "out"
    assert work.run(toy(Numbers()), out, finish, processes=0)
    return content(out)


def test_run_keeps_results_in_order(expected):
    lines = b"".join(expected[name] for name in expected if name.startswith("lines")).decode().splitlines()
    assert lines == [result for i in range(N) for result in repeat(i)]
    assert {"all.json", "work.json"} < expected.keys() and "lock" not in expected
    summaries = json.loads(expected["all.json"])
    assert [s["file"] for s in summaries][-1] is None, "item 24 has no results, so its chunk has no file"
    assert sum(s["lines"] for s in summaries) == len(lines)


@pytest.mark.parametrize("before, after", [(0, 2), (2, 1)])
def test_run_same_files_after_kill(expected, tmp_path, before, after):
    """SIGKILL to the process that reads item 14, then another number of workers."""
    source, out = Numbers("kill", 14, tmp_path / "happened"), tmp_path / "out"
    if before == 0:  # this process would be killed, so a child does the work
        if (child := os.fork()) == 0:
            work.run(toy(source), out, finish, processes=0)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert len(list(work.committed(tmp_path / ".out.partial"))) == 3
    else:
        with pytest.raises(ChildProcessError, match="a worker process died"):
            work.run(toy(source), out, finish, processes=before)
    assert not out.exists()
    assert work.run(toy(source), out, finish, processes=after)
    assert content(out) == expected and not (tmp_path / ".out.partial").exists()


def test_run_recognises_its_own_directory(expected, tmp_path):
    out = tmp_path / "out"
    assert work.run(toy(Numbers()), out, finish, processes=0)
    assert not work.run(toy(Numbers()), out, finish, processes=0)
    with pytest.raises(FileExistsError, match=r"with other options.*:\n  limit: null, now 3$"):
        work.run(toy(Numbers(), limit=3), out, finish, processes=0)
    assert content(out) == expected


def test_run_stops_when_check_raises(expected, tmp_path):
    seen = 0

    def check(directory: Path, summary: Summary) -> None:
        nonlocal seen
        seen += summary["lines"]
        if seen > 6:
            raise ValueError("more than 6")

    for _ in range(2):  # committed chunks are checked before any further work
        seen = 0
        with pytest.raises(ValueError, match="more than 6") as raised:
            work.run(toy(Numbers()), tmp_path / "out", finish, check=check, processes=0)
        assert raised.value.__notes__ == [
            f"completed chunks are in {tmp_path / '.out.partial'}; the same command continues from there"
        ]
        assert len(list(work.committed(tmp_path / ".out.partial"))) == 2
    work.run(toy(Numbers()), tmp_path / "out", finish, processes=0)
    assert content(tmp_path / "out") == expected


def test_run_retries_reading(expected, tmp_path, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(retry.time, "sleep", waits.append)
    work.run(toy(Numbers("error", 14, tmp_path / "happened")), tmp_path / "out", finish, processes=0)
    assert content(tmp_path / "out") == expected and waits == [0.5]
