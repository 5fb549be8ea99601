"""The forms in which an image is given: one list for imports and for the Python API.

    a path, a file: URL         a string or a pathlib.Path
    a data: URI                 base64 or percent-encoded
    the bytes of an image file  also as an open binary file
    a mapping                   with one of these under a key of ``IMAGE_KEYS``, as Hugging Face and OpenAI write it

The Python API also takes a PIL image and a uint8 array, [height, width] or [height, width, 3 or 4]. Only an import
fetches http(s) addresses, with --allow-urls (``data/sources/fetch.py``).
"""

import base64
import os
import re
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageFile

from phivision_jax.images.decode import open_image, upright
from phivision_jax.io.messages import shorten

type ImageSource = Image.Image | np.ndarray | bytes | str | Path | BinaryIO | Mapping[str, Any]

IMAGE_KEYS = ("image", "bytes", "path", "url", "image_url")
"""Keys of a part that may hold an image; the first whose value is not null counts."""
SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")
_FILE_URL = re.compile(r"file:(//(localhost(?=/))?)?", re.IGNORECASE)


def pixels(source: ImageSource, name: str = "image") -> Image.Image:
    """Open an image given in any of these forms.

    Image files are turned by their EXIF orientation, also those that ``PIL.Image.open`` has opened, as in training.
    Arrays and images that were edited or converted are taken as they are.

    Args:
      name: the image's name in errors.

    Raises:
      ValueError: for anything else, and for what cannot be decoded.
      OSError: when a file cannot be read.
    """
    given: Any = source
    while isinstance(given, Mapping):
        given = next((given[key] for key in IMAGE_KEYS if given.get(key) is not None), None)
    if isinstance(given, ImageFile.ImageFile):
        try:
            return upright(given)
        except Exception as error:  # decoders raise anything
            raise ValueError(f"{name} cannot be decoded: {error}") from error
    if isinstance(given, Image.Image):
        return given
    if hasattr(given, "read"):
        if given.seekable():
            given.seek(0)  # a buffer that was just written is at its end
        given = given.read() or b""
        if isinstance(given, str):
            raise ValueError(f'{name} is a file that was opened as text: open it with mode "rb"')
    given = content_or_place(given, name)
    if isinstance(given, bytes):
        return open_image(given, name)
    if isinstance(given, str) and SCHEME.match(given):
        raise ValueError(f"{name} is at {shorten(given)}, which is not fetched: download it, and give its path")
    if isinstance(given, str | os.PathLike):
        return open_image(Path(given))
    kinds = "a path, bytes, a PIL image or a uint8 array [height, width] or [height, width, 3 or 4]"
    if not hasattr(given, "__array__"):
        raise ValueError(f"{name} is given as {type(given).__name__}: give {kinds}")
    array = np.asarray(given)
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))):
        raise ValueError(f"{name} is an array {array.shape} of {array.dtype}: give {kinds}")
    return Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array)


def listed(images: Any) -> list[Any]:
    """Images as a list: one image, several, or None for none."""
    return list(images) if isinstance(images, list | tuple) else [] if images is None else [images]


def content_or_place(given: Any, name: str) -> Any:
    """The bytes in a buffer or a data: URI; the path or another URL in a string; anything else unchanged.

    Raises:
      ValueError: for a data: URI without content, or of broken base64.
    """
    if isinstance(given, bytearray | memoryview):
        return bytes(given)
    if not isinstance(given, str):
        return given
    if given[:5].lower() != "data:":
        file = _FILE_URL.match(given)
        return urllib.parse.unquote(given[file.end() :]) if file else given
    header, comma, body = given.partition(",")
    if not comma:
        raise ValueError(f"{name} is a data URI without content")
    try:
        if not header.lower().endswith(";base64"):
            return urllib.parse.unquote_to_bytes(body)
        return base64.b64decode("".join(urllib.parse.unquote(body).split()), validate=True)
    except ValueError as error:  # binascii.Error is one
        raise ValueError(f"{name} is a data URI that cannot be decoded: {error}") from None
