"""The bytes of an image, from what a data set gives for it: a path, a struct, a data URI or a URL.

Data sets are imported by people who did not write them. So a path may not leave the image folder, by ``..`` or by a
symbolic link, except into folders that are named; URLs are fetched only if the user asks for it, only over http, and no
redirect leads from the internet to addresses of this machine or its network; and a file whose name belongs to another
format is rejected, because it was probably mixed up with another file. Only the header of the content is read here.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import os
import socket
import stat
import unicodedata
import urllib.parse
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image

from phivision_jax.data.quarantine import BadRecord
from phivision_jax.data.sources.item_options import ItemOptions
from phivision_jax.data.sources.keys import is_blank
from phivision_jax.images.decode import image_format
from phivision_jax.images.sources import SCHEME, decode_data_uri, local_path
from phivision_jax.io.messages import shorten

MAX_DOWNLOAD = 64 * 2**20
"""Bytes."""
TRIES = 3
TIMEOUT = 30.0
"""Seconds without an answer."""
DEADLINE = 60.0
"""Seconds for a URL, all tries together, however slowly its bytes arrive."""
PAUSE = 1.0
"""Seconds before the second try; twice as many before the third."""

# These mean that there is no such file; any other error is a problem of the disk, not of the record.
_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EINVAL, errno.EISDIR, errno.ELOOP)


def is_given(value: Any) -> bool:
    """True if a field has an image: not null, NaN, "" or a struct without content."""
    return not is_blank(value) if isinstance(value, dict) else value != "" and not (value is None or value != value)


def fetch(value: Any, folder: Path, options: ItemOptions) -> bytes:
    """The bytes of an image file.

    Args:
      value: bytes; a path (relative to ``folder``, or absolute and inside it), a data URI or a URL; or a mapping with
        ``bytes``, ``path`` or ``url``, of which the first that is given counts.
      folder: folder that no path may leave.
      options: ``also_allow``, ``allow_urls`` and ``any_extension`` count.

    Raises:
      BadRecord: "fields", "image-path", "image-missing", "image-url", "image-extension", "image-broken".
      OSError: when a file exists but cannot be read.
    """
    if isinstance(value, Mapping):
        given = next((value[key] for key in ("bytes", "path", "url") if is_given(value.get(key))), None)
        if given is None:
            raise BadRecord(
                "fields", f"an image is a struct of {shorten(', '.join(map(str, value)))}: it needs bytes, path or url"
            )
        value = given
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if not isinstance(value, str):
        raise BadRecord("fields", f"an image is given as {type(value).__name__}, not as a path, bytes or a URL")
    if value[:5].lower() == "data:":
        try:
            return decode_data_uri(value, "the image")
        except ValueError as error:
            raise BadRecord("image-broken", str(error)) from None
    value = local_path(value)
    if SCHEME.match(value):
        return _from_url(value, options.allow_urls)
    content = _from_path(value, [folder, *options.also_allow])
    if not options.any_extension:
        _check_extension(value, content)
    return content


def _from_path(path: str, folders: list[Path]) -> bytes:
    """The content of a file, which may be stored under the same name in another spelling.

    Paths come with backslashes from Windows, percent-encoded from web pages, and in other Unicode forms from macOS.
    """
    try:
        return _read(path, folders)
    except BadRecord as missing:
        slashes = path.replace("\\", "/")
        spellings = [path, slashes, urllib.parse.unquote(path), urllib.parse.unquote(slashes)]
        spellings += [unicodedata.normalize(form, text) for text in spellings for form in ("NFC", "NFD")]
        for other in spellings[1:] if missing.reason == "image-missing" else ():
            with contextlib.suppress(BadRecord):
                return _read(other, folders)
        raise


def _read(path: str, folders: list[Path]) -> bytes:
    name, (root, *also_allowed) = shorten(path), map(os.path.realpath, folders)
    try:
        real = os.path.realpath(os.path.join(root, path))
        if not any(_is_in(real, allowed) for allowed in (root, *also_allowed)):
            by_link = _is_in(os.path.normpath(os.path.join(root, path)), root)
            hint = f" to {shorten(real)}, by a symbolic link: --also-allow names folders for such targets"
            raise BadRecord("image-path", f"{name} leads out of the image folder {root}{hint if by_link else ''}")
        # Opening a pipe would block forever.
        if not stat.S_ISREG(os.stat(real).st_mode):
            raise BadRecord("image-missing", f"{name} is not a file")
        with open(real, "rb") as file:
            return file.read()
    except OSError as error:
        if error.errno in _MISSING:
            raise BadRecord("image-missing", f"there is no file {name} in {root}") from None
        raise
    except BadRecord:
        raise
    except ValueError:  # a null byte, or characters that no file name can have
        raise BadRecord("image-missing", f"{name} cannot be a file name on this system") from None


def _is_in(path: str, folder: str) -> bool:
    return os.path.commonpath([folder, path]) == folder


def _check_extension(path: str, content: bytes) -> None:
    expected = Image.registered_extensions().get(os.path.splitext(path)[1].lower(), "").replace("MPO", "JPEG")
    # What cannot be opened at all is left to the check of records, which reports why.
    if expected and (found := image_format(content)) not in (None, expected):
        raise BadRecord("image-extension", f"{shorten(path)} is named {expected}, but its content is {found}")


def _from_url(url: str, allowed: bool) -> bytes:
    _check_scheme(url)
    if not allowed:
        raise BadRecord("image-url", f"{shorten(url)} is not fetched: URLs need --allow-urls")
    try:
        with ThreadPoolExecutor(1) as pool:  # this thread may have an event loop of its own, as in a notebook
            return pool.submit(asyncio.run, _download(url)).result()
    except TimeoutError:
        problem = f"cannot be fetched: not complete within {DEADLINE:g} seconds"
        raise BadRecord("image-url", f"{shorten(url)} {problem}") from None


def _check_scheme(url: str) -> None:
    if not url.lower().startswith(("http://", "https://")):
        raise BadRecord("image-url", f"{shorten(url)} is not fetched: only http(s) is supported; copy the file here")


async def _download(url: str) -> bytes:
    """Raises TimeoutError after ``DEADLINE``."""
    import aiohttp  # takes a third of a second, and most data sets have no URLs

    async def check_redirect(session: Any, context: Any, answer: aiohttp.TraceRequestRedirectParams) -> None:
        target = urllib.parse.urljoin(str(answer.url), answer.response.headers.get("Location", ""))
        _check_scheme(target)
        if _is_inside(target) and not _is_inside(url):
            problem = f"is not fetched: it leads to {shorten(target)}, inside this network"
            raise BadRecord("image-url", f"{shorten(url)} {problem}")

    trace = aiohttp.TraceConfig()
    trace.on_request_redirect.append(check_redirect)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT, sock_read=TIMEOUT)
    session = aiohttp.ClientSession(timeout=timeout, trace_configs=[trace], trust_env=True)
    problem = ""
    async with asyncio.timeout(DEADLINE), session:
        for attempt in range(TRIES):
            if attempt:
                await asyncio.sleep(PAUSE * 2 ** (attempt - 1))
            try:
                async with session.get(url, headers={"User-Agent": "phivision"}, raise_for_status=True) as answer:
                    content = b""
                    async for piece in answer.content.iter_any():
                        content += piece
                        if len(content) > MAX_DOWNLOAD:
                            raise BadRecord("image-url", f"{shorten(url)} is larger than {MAX_DOWNLOAD // 2**20} MiB")
                    return content
            except BadRecord:
                raise
            except aiohttp.InvalidURL:
                problem = "it is not a URL"
                break
            except aiohttp.ClientResponseError as error:
                problem = f"status {error.status}"
                if error.status < 500 and error.status not in (408, 429):  # trying again would not help
                    break
            except (aiohttp.ClientError, OSError, ValueError) as error:
                problem = str(error)
    raise BadRecord("image-url", f"{shorten(url)} cannot be fetched: {shorten(problem)}")


def _is_inside(url: str) -> bool:
    """True if a URL's host has an address that the internet does not reach: loopback, private, link-local.

    A data set may name such an address outright (the user's own server), but a redirect by a foreign server may not:
    these addresses serve what only this machine should see. A name that cannot be resolved is left to the fetch.
    """
    try:
        found = socket.getaddrinfo(urllib.parse.urlsplit(url).hostname, None, type=socket.SOCK_STREAM)
        addresses = [ipaddress.ip_address(str(address[0]).partition("%")[0]) for *_, address in found]
    except (OSError, ValueError):  # ValueError: no URL, or no name
        return False
    return any(not address.is_global for address in addresses)
