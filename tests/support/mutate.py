"""Seeded damage to text files: what a crash, a bad disk, an editor or a stranger may leave."""

from __future__ import annotations

import random

PIECES = [b"\0" * 9, b"NaN", b"-1e999", b"null", b"true", b'"x"', b"[]", b"{}", b"[[[[", b"}", b'"', b"\\", b"\xff\xfe"]
PIECES += [b"9" * 30, b"9" * 5000, b"-1", b"1.5", b"\n", b"\r", b",", b":", b"", b"\xef\xbb\xbf", b"'", b"#", b"("]


def mutate(content: bytes, rng: random.Random) -> bytes:
    """The content with one to three changes: a part replaced, flipped, cut out, repeated, filled with NULs, cut off."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        start, length = rng.randrange(len(content) + 1), rng.choice((0, 1, 2, 5, 30))
        end = min(start + length, len(content))
        match rng.randrange(6):
            case 0 | 1:
                content = content[:start] + rng.choice(PIECES) + content[end:]
            case 2:
                content = (
                    content[:start]
                    + bytes(byte ^ (1 << rng.randrange(8)) for byte in content[start:end])
                    + content[end:]
                )
            case 3:
                content = content[:start] + content[end:]
            case 4:
                content = content[:end] + content[start:]
            case 5:
                content = content[:start] if rng.random() < 0.2 else content[:start] + bytes(length) + content[end:]
    return content
