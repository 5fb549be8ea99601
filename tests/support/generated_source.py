"""A source that workers can unpickle: made-up records, bad ones at stated positions, and errors on demand."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from phivision_jax.data.quarantine import Quarantined
from phivision_jax.data.sources.source import Read
from tests.support.records import make_record

KINDS: list[tuple[tuple[int, int], ...]] = [(), ((24, 16),), ((64, 64),), ((16, 40),), ((24, 16), (32, 32)), ((8, 8),)]


class MadeUpSource:
    """``n`` records; item i is unreadable if i is in ``unreadable``, and has an empty answer if it is in ``silent``.

    ``mishap`` happens at item ``item`` unless the file ``once`` exists, which is made then.
    """

    def __init__(
        self,
        n: int,
        *,
        unreadable: tuple[int, ...] = (),
        silent: tuple[int, ...] = (),
        mishap: str = "",
        item: int = -1,
        once: Path | None = None,
        name: str = "made-up",
    ) -> None:
        self.name, self._n = name, n
        self._unreadable, self._silent = unreadable, silent
        self._mishap, self._item, self._once = mishap, item, once

    def __len__(self) -> int:
        return self._n

    def key(self) -> Any:
        return {"n": self._n, "unreadable": self._unreadable, "silent": self._silent}

    def read(self, start: int, stop: int) -> Iterator[Read | Quarantined]:
        for i in range(start, stop):
            if i == self._item and not (self._once and self._once.exists()):
                if self._once:
                    self._once.touch()
                self._happen()
            if i in self._unreadable:
                yield Quarantined(f"set:{i + 1}", self.name, "syntax", "not JSON: \udc80", f"set, line {i + 1}")
                continue
            record = make_record(i, KINDS[i % len(KINDS)], mode=None if i % 7 == 0 else "nothink")
            if i in self._silent:
                record = make_record(i, (), messages=({"role": "user", "content": "a"},))
            yield Read(record, ("stated", "inferred", "default")[i % 3], system=i % 5 == 0, where=f"set, line {i + 1}")

    def _happen(self) -> None:
        if self._mishap == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self._mishap == "io":
            raise OSError(5, "Input/output error", "set")
        elif self._mishap == "denied":
            raise PermissionError(13, "Permission denied", "set")
        elif self._mishap == "bug":
            raise KeyError("made up")
        elif self._mishap == "sleep":
            time.sleep(60)
