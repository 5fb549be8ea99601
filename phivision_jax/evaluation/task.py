"""The items of a benchmark that an evaluation asks, and their fingerprints: a changed data set is seen."""

import dataclasses
import functools
import hashlib
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

from phivision_jax.evaluation.benchmark import Benchmark, Item
from phivision_jax.inference.requests import Request
from phivision_jax.text.constants import PromptMode

_SETTINGS = ("max_new_tokens", "thinking_budget", "temperature", "top_p", "top_k", "seed", "stop", "n")


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings of all requests of an evaluation, as in ``Request``."""

    max_new_tokens: int | None = None
    """None leaves the limit of each benchmark."""
    thinking_budget: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def request(self, benchmark: Benchmark, item: Item, mode: PromptMode = "auto") -> Request:
        """The request for an item in a mode.

        Raises:
          ValueError: for settings that ``Request`` refuses.
        """
        given = {name: value for name, value in vars(self).items() if value != getattr(Request, name)}
        request = benchmark.request(item)
        if not given and mode == request.mode:
            return request
        return dataclasses.replace(request, mode=mode, **given)


@dataclasses.dataclass(frozen=True)
class Task:
    """A benchmark and the items of it that are asked."""

    benchmark: Benchmark
    items: Sequence[Item]
    chosen: tuple[int, ...]
    """Numbers of the items that are asked, ascending."""
    fingerprint: str
    """SHA-256 over the requests and the records of these items."""

    @property
    def name(self) -> str:
        return self.benchmark.name

    def shard(self, index: int, count: int) -> "Task":
        """The share of one of several processes: neighbours, which often share an image, stay together."""
        first, end = (len(self.chosen) * i // count for i in (index, index + 1))
        return dataclasses.replace(self, chosen=self.chosen[first:end])


def survey(
    benchmark: Benchmark,
    items: Sequence[Item],
    sampling: Sampling,
    *,
    limit: int = 0,
    seed: int = 0,
    measure: Callable[[Request], Any] = lambda _: None,
) -> Task:
    """Choose the items that are asked, and read each of them once.

    Args:
      limit: size of a random sample; 0 for all items.
      seed: of the sample.
      measure: receives the request of each item.

    Raises:
      ValueError: for an id that occurs twice, or a benchmark without items.
    """
    if not len(items):
        raise ValueError(f"{benchmark.name} has no items")
    chosen = sample(len(items), limit, seed)
    content, ids = hashlib.sha256(), set[str]()
    for i in chosen:
        item = items[i]
        if item.id in ids:
            raise ValueError(f"{benchmark.name}: two items have the id {item.id!r:.100}; each needs its own")
        ids.add(item.id)
        request = sampling.request(benchmark, item)
        measure(request)
        about = [item.id, fingerprint(request), item.record, item.groups, item.cluster]
        content.update(json.dumps(about, sort_keys=True, default=_hashed).encode())
    return Task(benchmark, items, chosen, content.hexdigest())


def sample(count: int, limit: int, seed: int) -> tuple[int, ...]:
    """Numbers below ``count``, ascending: ``limit`` of them at random, or all for 0."""
    numbers = range(count)
    return tuple(sorted(random.Random(seed).sample(numbers, limit)) if 0 < limit < count else numbers)


def fingerprint(request: Request) -> str:
    """SHA-256 of a request's messages, bytes of images and settings of sampling, without its mode."""
    messages, images = request.conversation()
    settings = {name: getattr(request, name) for name in _SETTINGS}
    content = json.dumps([messages, images, settings], sort_keys=True, default=_hashed)
    return hashlib.sha256(content.encode()).hexdigest()


def _hashed(value: Any) -> str:
    """The place of bytes, such as images, in JSON; of other values that JSON has no form for, their representation."""
    return digest(value) if isinstance(value, bytes) else repr(value)


@functools.lru_cache(8)
def digest(image: bytes) -> str:
    """SHA-256 of an image. The last few are kept, because neighbouring items often share an image."""
    return hashlib.sha256(image).hexdigest()
