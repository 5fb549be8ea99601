"""Seeded mutations of JSON files: wrong kinds and sizes of any value, lost and renamed keys, broken bytes."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 2**31, 2**63, -(2**64), 10**30, 10**400, 0.5, -0.0, 1e400, float("nan"), "", "x",
    "\x00", "../x", "a" * 3000, "\x1b[31m", "🎉\ud800", "float32", [], [[]], [None], [0], [-1, -1], [1e9], {}, {"": {}},
    {"a": None}, [[[[[[]]]]]], ["x"] * 50,
)  # fmt: skip
BROKEN = (
    b"", b"\x00" * 40, b"[" * 100_000, b'{"a":' * 100_000, b"null", b"[]", b"3", b'"x"', b"NaN", b"9" * 5000,
    b"version https://git-lfs.github.com/spec/v1\n", b"<!DOCTYPE html><html></html>", b"\xff\xfe{\x00}\x00",
)  # fmt: skip


def mutations(content: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    """Mutated copies of a JSON file."""
    rng = random.Random(seed)
    yield from BROKEN
    for i in range(count - len(BROKEN)):
        if i % 5 == 0:
            yield _break_bytes(rng, content)
            continue
        mutated = json.loads(content)
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            mutated = _mutate(rng, mutated)
        yield json.dumps(mutated).encode()


def _break_bytes(rng: random.Random, content: bytes) -> bytes:
    data, place = bytearray(content), rng.randrange(len(content))
    kind = rng.randrange(4)
    if kind == 0:
        return bytes(data[:place])
    if kind == 1:
        data[place] ^= 1 << rng.randrange(8)
    elif kind == 2:
        data[place:place] = bytes(rng.randrange(256) for _ in range(3))
    else:
        del data[place : place + rng.randrange(1, 30)]
    return bytes(data)


def _mutate(rng: random.Random, value: Any) -> Any:
    """Change one place of a nested value, near the top as often as deep inside."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.05:
        return copy.deepcopy(rng.choice(ODD))
    key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
    kind = rng.random()
    if kind < 0.5 and isinstance(value[key], dict | list):
        value[key] = _mutate(rng, value[key])
    elif kind < 0.6:
        del value[key]
    elif kind < 0.7 and isinstance(value, dict):
        value[rng.choice(["", "x" * 300, f"{key}\x00", f"{key}.{key}", "__metadata__"])] = value.pop(key)
    elif kind < 0.75 and isinstance(value, list):
        value.append(copy.deepcopy(rng.choice(value)))
    else:
        value[key] = copy.deepcopy(rng.choice(ODD))
    return value


def survivors(content: bytes, read: Callable[[bytes], Any], *names: str, count: int = 2000) -> int:
    """Read mutated files: how many are accepted.

    Every other one must raise a ValueError or an OSError of one line, at most 600 characters, with one of ``names``.
    """
    accepted = 0
    for mutated in mutations(content, count):
        try:
            read(mutated)
            accepted += 1
        except (ValueError, OSError) as error:
            text = str(error)
            assert any(name in text for name in names) and len(text) < 600 and text.isprintable(), (
                mutated[:2000],
                text,
            )
        except BaseException as error:
            raise AssertionError(mutated[:2000]) from error
    return accepted
