"""The cost protocol: seconds and output tokens per item, on 100 random items of four benchmarks, one at a time, warm.

That is the protocol of the published figure of accuracy against time and tokens. Nothing of an item is computed before
it is timed: prefixes are not shared, replies are not cached, all items are asked in one mode before the next, and
programs are compiled, and each mode asked once, before the first.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from phivision_jax.evaluation.summary import Summary
from phivision_jax.evaluation.task import Sampling, Task
from phivision_jax.inference.requests import Generator
from phivision_jax.io import atomic
from phivision_jax.text.constants import PromptMode

BENCHMARKS = ("chartqa", "mathvista", "mmmu", "screenspot_v2")
ITEMS = 100
LOCAL: dict[str, Any] = {"slots": 1, "share_prefixes": False, "image_bytes": 0}
"""Settings of a local generator."""


def warm_up(generator: Generator, tasks: Sequence[Task], modes: Sequence[PromptMode], sampling: Sampling) -> None:
    """Ask the first item of each benchmark in each mode, and drop the replies; failures are those of the run too."""
    asked = [
        sampling.request(task.benchmark, task.items[task.chosen[0]], mode)
        for task in tasks if task.chosen for mode in modes
    ]  # fmt: skip
    for _ in generator.as_finished(asked):
        pass


def write_cost(directory: Path, summaries: Sequence[Summary]) -> None:
    """Write cost.json: means per benchmark and mode.

    Raises:
      OSError: when it cannot be written.
    """
    kept = ("benchmark", "mode", "items", "failed", "seconds", "output_tokens", "thinks", "figures")
    costs = [{name: value for name, value in dataclasses.asdict(each).items() if name in kept} for each in summaries]
    protocol = {"items": ITEMS, "batch": 1, "warm": True, "prefixes_shared": False}
    atomic.write(directory / "cost.json", json.dumps({"protocol": protocol, "costs": costs}, indent=1) + "\n")
