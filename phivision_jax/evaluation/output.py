"""The directory of an evaluation while it runs: its settings, and results that are written as they are finished.

Started again with the same settings, an evaluation continues: results are kept, except those whose request or judge has
failed, which are asked again. With other settings it is refused. A process holds a lock on its shard.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from phivision_jax.evaluation.benchmark import Item
from phivision_jax.evaluation.results import IMAGES, RUN, Result, read_results, results_file
from phivision_jax.io import atomic, jsonl
from phivision_jax.io.messages import differences, shorten
from phivision_jax.io.read_json import read_json

ABOUT = "about"
"""The key of settings that may differ when an evaluation continues."""
_NAMED = 8
"""Differences that an error names."""


class Output:
    """Results of one shard on their way to disk; a context manager.

    Args:
      directory: created if need be.
      settings: written to run.json; all shards of an evaluation have the same.
      shard: number of this process's share, from 0.
      restart: remove what an earlier start has written.

    Raises:
      ValueError: when an evaluation with other settings is in the directory, naming the differences; when another
        process writes the same shard.
      OSError: when the directory cannot be written.

    Attributes:
      values: scores of earlier starts and of this one, by ``Result.key``.
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any], *, shard: int = 0, restart: bool = False) -> None:
        self.directory = directory
        self._images = directory / IMAGES
        self._images.mkdir(parents=True, exist_ok=True)
        try:
            self._lock = atomic.lock(directory / f".results-{shard}.lock")
        except BlockingIOError:
            raise ValueError(f"{directory}: another process writes shard {shard} of this evaluation") from None
        try:
            path = results_file(directory, shard)
            if restart:
                self._remove(path, everything=settings["shards"] == 1)
            self._check(settings)
            kept = read_results(path)
            answered = [result for result in kept if not result.error]
            self.values = {result.key: result.value for result in answered}
            if len(answered) < len(kept):
                rows = [json.dumps(vars(result), ensure_ascii=False) + "\n" for result in answered]
                atomic.write(path, "".join(rows).encode(errors="backslashreplace"))
            self._log = jsonl.Writer(path)
        except BaseException:
            os.close(self._lock)
            raise
        self._stored = {child.name for child in self._images.iterdir()}

    def _remove(self, path: Path, *, everything: bool) -> None:
        for old in self.directory.glob("results-*.jsonl") if everything else [path]:
            old.unlink(missing_ok=True)
        (self.directory / RUN).unlink(missing_ok=True)
        if everything:
            shutil.rmtree(self._images)
            self._images.mkdir()

    def _check(self, settings: Mapping[str, Any]) -> None:
        """Compare the settings with those of the directory, or write them."""
        settings, path = json.loads(json.dumps(settings)), self.directory / RUN
        if not path.exists():
            atomic.write(path, json.dumps(settings, indent=1) + "\n")
        old, new = ({k: v for k, v in values.items() if k != ABOUT} for values in (read_json(path), settings))
        if changed := list(differences(old, new)):
            raise ValueError(f"{path} is of an evaluation with other settings: {_described(changed)}; give those, or "
                             "another --out, or --restart to remove its results")  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, result: Result, item: Item) -> None:
        """Append a result and store the images of its item; when this returns, they survive the end of the process.

        Raises:
          OSError: when they cannot be written; the error names the file.
        """
        for name, content in zip(result.images, item.images, strict=True):
            if name not in self._stored:
                atomic.write(self._images / name, content, durable=False)
                self._stored.add(name)
        self._log.write(vars(result))
        self.values[result.key] = result.value

    def close(self) -> None:
        """Close the files and release the lock."""
        self._log.close()
        os.close(self._lock)


def _described(changed: Sequence[tuple[str, Any, Any]]) -> str:
    """Differences of settings as a phrase, in which a fingerprint is called by its data."""
    parts = []
    for path, old, new in changed[:_NAMED]:
        name = path.removeprefix("benchmarks.").removesuffix(".fingerprint")
        if path.endswith(".fingerprint") and old and new:
            parts.append(f"the data of {name} has changed")
        else:
            parts.append(f"{path} was {shorten(old)}, is {shorten(new)}")
    more = len(changed) - len(parts)
    return "; ".join(parts) + (f"; and {more} more" if more else "")
