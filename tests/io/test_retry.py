"""Retries: how often, how long between, and which errors."""

import pytest

from phivision_jax.io import retry as module
from phivision_jax.io.retry import Backoff, retry


@pytest.fixture
def waits(monkeypatch):
    found = []
    monkeypatch.setattr(module.time, "sleep", found.append)
    return found


def failing(times, error):
    left = [times]

    def function():
        left[0] -= 1
        if left[0] >= 0:
            raise error
        return "done"

    return function


def test_retry_doubles_the_wait(waits):
    log = []
    error = OSError("busy")
    assert retry(failing(3, error), attempts=4, first_wait_s=0.5, log=log.append, what="record 3") == "done"
    assert waits == [0.5, 1.0, 2.0] and log[1] == "record 3: busy; trying again in 1.0 s"


def test_retry_raises_the_last_error(waits):
    error = OSError("busy")
    with pytest.raises(OSError, match="busy") as raised:
        retry(failing(3, error), attempts=3, first_wait_s=1)
    assert raised.value is error and waits == [1, 2]


def test_retry_raises_lasting_errors_at_once(waits):
    with pytest.raises(KeyError):
        retry(failing(1, KeyError("a")), attempts=3, first_wait_s=1)
    with pytest.raises(OSError):
        retry(failing(1, OSError("gone")), attempts=3, first_wait_s=1, transient=lambda error: "gone" not in str(error))
    assert waits == []


def test_backoff_counts_from_zero_after_success(waits):
    backoff = Backoff(3, 1.0)
    backoff.wait(OSError())
    backoff.reset()
    backoff.wait(OSError())
    backoff.wait(OSError())
    with pytest.raises(OSError):
        backoff.wait(OSError())
    assert waits == [1, 1, 2]
