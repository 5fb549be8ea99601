"""Read JSON of unknown origin: every error is a ``ValueError`` of one sentence that names the file."""

import json
import re
from typing import Any

from phivision_jax.io.messages import shorten
from phivision_jax.io.storage import Location, read_range, wrap_storage_errors

LARGEST_FILE = 128 * 2**20
"""Bytes: a larger file is refused without reading it. The largest released tokenizer has 17 MB."""
_KINDS: dict[type, str] = {dict: "an object", list: "an array"}
_SIGNS = {
    rb"version https://git-lfs": "is a pointer of Git LFS, not the file itself: run git lfs pull in its directory",
    rb"\s*(<!doctype html|<html)": "is an HTML page, as a failed download leaves it: download the file again",
    rb"\s*(<[?!][^>]*>\s*)*<svg": "is an SVG drawing, which has no pixels: convert it to PNG",
    rb".{4}ftyp(hei|hev|mif|msf|avi)": "is a HEIC or AVIF image, which is not read: convert it to PNG or JPEG",
    rb".{4}ftyp|\x1aE\xdf\xa3|RIFF....(AVI|WAVE)": "is a video or a sound, not an image: leave it out",
    rb"%PDF": "is a PDF document: convert its pages to PNG",
}
"""Regular expressions of the beginnings of files that are often in the place of others, and what to do."""


def read_json(path: Location, kind: type = dict) -> Any:
    """The contents of a JSON file, with or without a byte order mark.

    Args:
      kind: the type that the top level must have, dict or list.

    Raises:
      ValueError: when it is missing, not JSON, too large, or of another type, naming the file.
      StorageError: when the bucket does not answer.
    """
    return parse_json(read_limited(path), str(path), kind)


def read_limited(path: Location) -> bytes:
    """The contents of a file of at most ``LARGEST_FILE`` bytes; errors as ``read_json``."""
    try:
        with wrap_storage_errors(path):
            content = read_range(path, 0, LARGEST_FILE + 1)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    if len(content) > LARGEST_FILE:
        raise ValueError(f"{path} has more than {LARGEST_FILE:,} bytes, too many for a file of this kind")
    return content


def parse_json(content: bytes, name: str, kind: type = dict) -> Any:
    """As ``read_json``, of bytes that have been read from the file ``name``."""
    if known := wrong_file(content):
        raise ValueError(f"{name} {known}")
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON: {shorten(str(error))}") from None
    if not isinstance(value, kind):
        raise ValueError(f"{name} must contain {_KINDS[kind]}, not {_KINDS.get(type(value), shorten(value))}")
    return value


def wrong_file(head: bytes) -> str | None:
    """The end of a sentence for the first bytes of a file that has another in its place; None if they look genuine."""
    return next((known for sign, known in _SIGNS.items() if re.match(sign, head[:512], re.DOTALL | re.I)), None)
