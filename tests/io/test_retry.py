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
    assert retry(failing(3, error), 4, 0.5, log.append, "record 3") == "done"
    assert waits == [0.5, 1.0, 2.0] and log[1] == "record 3: busy; trying again in 1.0 s"


def test_retry_raises_the_last_error(waits):
    error = OSError("busy")
    with pytest.raises(OSError, match="busy") as raised:
        retry(failing(3, error), 3, 1, print, "record 3")
    assert raised.value is error and waits == [1, 2]


def test_retry_raises_other_errors_at_once(waits):
    with pytest.raises(KeyError):
        retry(failing(1, KeyError("a")), 3, 1, print, "record 3")
    assert waits == []


def test_backoff_counts_from_zero_after_success(waits):
    backoff = Backoff(3, 1.0, print)
    backoff.wait(OSError(), "record 3")
    backoff.reset()
    backoff.wait(OSError(), "record 3")
    backoff.wait(OSError(), "record 3")
    with pytest.raises(OSError):
        backoff.wait(OSError(), "record 3")
    assert waits == [1, 1, 2]
