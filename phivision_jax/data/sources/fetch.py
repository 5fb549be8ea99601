"""From what a data set says of an image to the bytes of its file: a path, a struct, a data URI, a URL.

A data set is read by people who did not write it. A path may not leave the image folder, by ``..`` or by a symbolic
link, but for folders that are named; a URL is fetched only if that is asked for, and only over http, and no redirect
leads from the open net to addresses of this machine or its network; and a file that is not of the kind its name says is
refused, because whoever mixed up names has mixed up pictures. Only the header of the content is looked at here.
"""

from __future__ import annotations

import base64
import binascii
import errno
import functools
import http.client
import io
import ipaddress
import os
import re
import socket
import stat
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from phivision_jax.data.quarantine import BadRecord

MAX_DOWNLOAD = 64 * 2**20
"""Bytes."""
TRIES = 3
TIMEOUT = 30.0
"""Seconds without an answer."""
DEADLINE = 60.0
"""Seconds for a whole URL, all tries together, however slowly its bytes drip in."""
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


def fetch(
    value: Any,
    folder: Path,
    *,
    also_allow: Sequence[Path] = (),
    allow_urls: bool = False,
    any_extension: bool = False,
) -> bytes:
    """The bytes of an image file.

    Args:
      value: bytes; a path (relative to ``folder``, or absolute and inside it), a data URI or a URL; or a mapping with
        one of ``bytes``, ``path``, ``url``, the first of them that is given.
      folder: what no path may leave.
      also_allow: further folders in which the file of a path may lie, once its links are followed.
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
    content = _from_path(value, folder, also_allow)
    if not any_extension:
        _check_extension(value, content)
    return content


def _from_path(path: str, folder: Path, also_allow: Sequence[Path]) -> bytes:
    root = os.path.realpath(folder)
    try:
        real = os.path.realpath(os.path.join(root, path))
    except ValueError:  # A null byte.
        raise BadRecord("image-missing", f"{path!r} is no path") from None
    if not any(_lies_in(real, fence) for fence in (root, *map(os.path.realpath, also_allow))):
        by_link = _lies_in(os.path.normpath(os.path.join(root, path)), root)
        how = f" to {real}, by a symbolic link: --also-allow names folders to which links may lead" if by_link else ""
        raise BadRecord("image-path", f"{path} leads out of the image folder {root}{how}")
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


def _lies_in(path: str, folder: str) -> bool:
    return os.path.commonpath([folder, path]) == folder


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
    # In a thread, since no timeout of urllib or the resolver bounds the whole. One that is given up ends by itself.
    found: list[bytes | Exception] = []

    def get() -> None:
        try:
            found.append(_answer(url))
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=get, daemon=True)
    thread.start()
    thread.join(DEADLINE)
    if not found:
        raise BadRecord("image-url", f"{url} cannot be fetched: not there within {DEADLINE:g} seconds")
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def _answer(url: str) -> bytes:
    # urllib's usual opener also reads file: and ftp:, and follows redirects to ftp:; this one has no handlers for them.
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        _Redirects(url),
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
        except BadRecord:
            raise
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


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but from the open net to no address of this machine or its network."""

    def __init__(self, url: str) -> None:
        self._url = url

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if _is_inside(newurl) and not _is_inside(self._url):
            raise BadRecord("image-url", f"{self._url} is not fetched: it leads to {newurl}, inside this network")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _is_inside(url: str) -> bool:
    """Whether a URL's host is, or has, an address that the open net does not reach: loopback, private, link-local.

    What a data set names outright may be such (a server of one's own), what a stranger's server redirects to may not:
    such addresses hand out what only this machine should see. A name that cannot be resolved is left to the fetch.
    """
    try:
        found = socket.getaddrinfo(urllib.parse.urlsplit(url).hostname, None, type=socket.SOCK_STREAM)
        addresses = [ipaddress.ip_address(str(address[0]).partition("%")[0]) for *_, address in found]
    except (OSError, ValueError):  # ValueError: no URL, or no name
        return False
    return any(not address.is_global for address in addresses)
