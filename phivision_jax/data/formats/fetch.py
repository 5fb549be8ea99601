"""From what a data set says of an image to the bytes of its file: a path, a struct, a data URI, a URL.

A data set is read by people who did not write it. A path may not leave the image folder, by ``..`` or by a symbolic
link; a URL is fetched only if that is asked for, and only over http; and a file that is not of the kind its name says
is refused, because whoever mixed up names has mixed up pictures. Only the header of the content is looked at here.
"""

from __future__ import annotations

import base64
import binascii
import errno
import functools
import http.client
import io
import os
import re
import stat
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from phivision_jax.data.quarantine import BadRecord

MAX_DOWNLOAD = 64 * 2**20
"""Bytes."""
TRIES = 3
TIMEOUT = 30.0
"""Seconds without an answer."""
PAUSE = 1.0
"""Seconds before the second try; twice as many before the third."""

# What says that there is no such file; all else is the disk's trouble, not the record's.
_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EINVAL, errno.EISDIR, errno.ELOOP)
_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")


def is_given(value: Any) -> bool:
    """Whether a field holds an image: not None, "" or a struct without content."""
    if isinstance(value, Mapping):
        return any(is_given(value.get(key)) for key in ("bytes", "path", "url"))
    return value is not None and not (isinstance(value, str) and not value)


def fetch(value: Any, folder: Path, *, allow_urls: bool = False, any_extension: bool = False) -> bytes:
    """The bytes of an image file.

    Args:
      value: bytes; a path (relative to ``folder``, or absolute and inside it), a data URI or a URL; or a mapping with
        one of ``bytes``, ``path``, ``url``, the first of them that is given.
      folder: what no path may leave.
      allow_urls: fetch http and https.
      any_extension: let pass a file whose content is of another format than its name says.

    Raises:
      BadRecord: "fields", "image-path", "image-missing", "image-url", "image-extension", "image-broken".
      OSError: when a file that is there cannot be read.
    """
    if isinstance(value, Mapping):
        value = next((value[key] for key in ("bytes", "path", "url") if is_given(value.get(key))), None)
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if not isinstance(value, str):
        raise BadRecord("fields", f"an image is given as {type(value).__name__}: neither a path nor bytes nor a URL")
    if value[:5].lower() == "data:":
        return _from_data_uri(value)
    if _SCHEME.match(value):
        return _from_url(value, allow_urls)
    content = _from_path(value, folder)
    if not any_extension:
        _check_extension(value, content)
    return content


def _from_path(path: str, folder: Path) -> bytes:
    root = os.path.realpath(folder)
    try:
        real = os.path.realpath(os.path.join(root, path))
    except ValueError:  # A null byte.
        raise BadRecord("image-missing", f"{path!r} is no path") from None
    if os.path.commonpath([root, real]) != root:
        raise BadRecord("image-path", f"{path} leads out of the image folder {root}")
    try:
        # A pipe would wait for ever.
        if not stat.S_ISREG(os.stat(real).st_mode):
            raise BadRecord("image-missing", f"{path} is not a file")
        with open(real, "rb") as file:
            return file.read()
    except OSError as error:
        if error.errno in _MISSING:
            raise BadRecord("image-missing", f"there is no file {path} in {root}") from None
        raise
    except UnicodeEncodeError:
        raise BadRecord("image-missing", f"{path!r} cannot be a file name on this system") from None


@functools.cache
def _formats() -> dict[str, str]:
    """Pillow's format of each file name extension."""
    return {extension: _plain(format) for extension, format in Image.registered_extensions().items()}


def _plain(format: str | None) -> str:
    # A camera's MPO is a JPEG with more pictures behind it, and is named .jpg.
    return "JPEG" if format == "MPO" else format or ""


def _check_extension(path: str, content: bytes) -> None:
    says = _formats().get(os.path.splitext(path)[1].lower())
    if says is None:
        return
    try:
        with Image.open(io.BytesIO(content)) as image:
            found = _plain(image.format)
    except Exception:
        return  # What cannot be opened at all is left to the check that says why.
    if found != says:
        raise BadRecord("image-extension", f"{path} says {says}, its content is {found}")


def _from_data_uri(uri: str) -> bytes:
    header, comma, body = uri.partition(",")
    if not comma:
        raise BadRecord("image-broken", "a data URI without content")
    if not header.lower().endswith(";base64"):
        return urllib.parse.unquote_to_bytes(body)
    try:
        return base64.b64decode("".join(urllib.parse.unquote(body).split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRecord("image-broken", f"a data URI whose content is not base64: {error}") from None


def _from_url(url: str, allowed: bool) -> bytes:
    if not allowed:
        raise BadRecord("image-url", f"{url} is not fetched: URLs need --allow-urls")
    if not url.lower().startswith(("http://", "https://")):
        raise BadRecord("image-url", f"{url} is not http or https: nothing else is fetched")
    # urllib's usual opener also reads file: and ftp:, and follows redirects to ftp:; this one has no handlers for them.
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    for again in range(TRIES):
        if again:
            time.sleep(PAUSE * 2 ** (again - 1))
        try:
            request = urllib.request.Request(url, headers={"User-Agent": "phivision"})
            with opener.open(request, timeout=TIMEOUT) as answer:
                content = answer.read(MAX_DOWNLOAD + 1)
                if answer.length and len(content) <= MAX_DOWNLOAD:
                    raise OSError(f"the answer ends {answer.length} bytes early")
        except urllib.error.HTTPError as error:
            problem = f"status {error.code}"
            error.close()
            if error.code < 500 and error.code not in (408, 429):  # Asking again changes nothing.
                break
        except (OSError, http.client.HTTPException, ValueError) as error:
            problem = str(error)
        else:
            if len(content) > MAX_DOWNLOAD:
                raise BadRecord("image-url", f"{url} holds more than {MAX_DOWNLOAD // 2**20} MiB")
            return content
    raise BadRecord("image-url", f"{url} cannot be fetched: {problem}")
