"""Seeded mutations of files: damaged bytes, and in JSON wrong kinds and sizes of any value, lost and renamed keys."""

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


PIECES = (
    b"\0" * 9, b"NaN", b"-1e999", b"null", b"true", b'"x"', b"[]", b"{}", b"[[[[", b"[" * 40, b"}", b'"', b"\\",
    b"\xff\xfe", b"\xff" * 8, b"9" * 30, b"9" * 5000, b"-1", b"1.5", b"\n", b"\r", b",", b":", b"", b"\xef\xbb\xbf",
    b"'", b"#", b"(",
)  # fmt: skip
"""Bytes that a crash, a bad disk, an editor or a stranger may leave."""


def damage_bytes(content: bytes, rng: random.Random) -> bytes:
    """The content with one to four changes: a part replaced, flipped, removed, repeated or zeroed, or the end lost."""
    for _ in range(rng.choice((1, 1, 2, 3, 4))):
        start, length = rng.randrange(len(content) + 1), rng.choice((0, 1, 2, 4, 8, 40))
        end = min(start + length, len(content))
        part = content[start:end]
        new = rng.choice(
            (
                rng.choice(PIECES),
                rng.randbytes(length),
                bytes(byte ^ (1 << rng.randrange(8)) for byte in part),
                b"",
                part + part,
                bytes(length),
            )
        )
        content = content[:start] if rng.random() < 0.05 else content[:start] + new + content[end:]
    return content


def mutations(content: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    """Mutated copies of a JSON file."""
    rng = random.Random(seed)
    yield from BROKEN
    for i in range(count - len(BROKEN)):
        if i % 5 == 0:
            yield damage_bytes(content, rng)
            continue
        mutated = json.loads(content)
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            mutated = _mutate(rng, mutated)
        yield json.dumps(mutated).encode()


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
