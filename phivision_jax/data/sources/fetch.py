"""The bytes of an image, from what a data set gives for it: a path, a struct, a data URI or a URL.

Data sets are imported by people who did not write them. So a path may not leave the image folder, by ``..`` or by a
symbolic link, except into folders that are named; URLs are fetched only if the user asks for it, only over http, and no
connection goes to an address of this machine or its network unless the user names it; and no image may be larger than
``LARGEST``. The content decides about an image's format: its name may say another, which is only counted.
"""

import asyncio
import contextlib
import errno
import ipaddress
import os
import socket
import stat
import unicodedata
import urllib.parse
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image

from phivision_jax.data.quarantine import BadRecord
from phivision_jax.data.sources.item_options import ItemOptions, Network
from phivision_jax.data.sources.keys import is_blank
from phivision_jax.images.decode import image_format
from phivision_jax.images.sources import SCHEME, content_or_place
from phivision_jax.io.memory import limited_memory
from phivision_jax.io.messages import shorten

type Address = ipaddress.IPv4Address | ipaddress.IPv6Address

LARGEST = 64 * 2**20
"""Bytes of an image's file, wherever it comes from."""
TRIES = 3
TIMEOUT = 30.0
"""Seconds without an answer."""
DEADLINE = 60.0
"""Seconds for a URL, all tries together, however slowly its bytes arrive."""
PAUSE = 1.0
"""Seconds before the second try; twice as many before the third."""

# These mean that there is no such file; any other error is a problem of the disk, not of the record.
_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EINVAL, errno.EISDIR, errno.ELOOP)
# Besides those that Python's version knows: metadata services of clouds, and networks that carry IPv4 inside IPv6.
_INSIDE = [*map(ipaddress.ip_network, ("192.0.0.0/24", "168.63.129.16", "2001::/32", "2002::/16"))]
_GLOBAL_6, _NAT64 = ipaddress.ip_network("2000::/3"), ipaddress.ip_network("64:ff9b::/96")


def is_given(value: Any) -> bool:
    """True if a field has an image: not null, NaN, "" or a struct without content."""
    return not is_blank(value) if isinstance(value, dict) else value != "" and not (value is None or value != value)


def fetch(value: Any, folder: Path, options: ItemOptions) -> bytes:
    """The bytes of an image file.

    Args:
      value: bytes; a path (relative to ``folder``, or absolute and inside it), a data URI or a URL; or a mapping with
        ``bytes``, ``path`` or ``url``, of which the first that is given counts.
      folder: folder that no path may leave.
      options: ``also_allow``, ``allow_urls`` and ``allow_networks`` count.

    Raises:
      BadRecord: "fields", "image-path", "image-missing", "image-url", "image-size", "image-broken".
      OSError: when a file exists but cannot be read.
    """
    if isinstance(value, Mapping):
        given = next((value[key] for key in ("bytes", "path", "url") if is_given(value.get(key))), None)
        if given is None:
            names = shorten(", ".join(map(str, value)))
            raise BadRecord("fields", f"an image is a struct of {names}: it needs bytes, path or url")
        value = given
    try:
        with limited_memory():
            content = content_or_place(value, "the image")
    except ValueError as error:
        raise BadRecord("image-broken", str(error)) from None
    if isinstance(content, str):
        is_url, folders = SCHEME.match(content), [folder, *options.also_allow]
        content = _from_url(content, options) if is_url else _from_path(content, folders)
    if not isinstance(content, bytes):
        raise BadRecord("fields", f"an image is given as {type(value).__name__}, not as a path, bytes or a URL")
    if len(content) > LARGEST:
        raise BadRecord("image-size", f"an image file has more than {LARGEST:,} bytes")
    return content


def other_format(value: Any, content: bytes) -> bool:
    """True for an image whose path ends like one of another format."""
    if not isinstance(value, str):
        return False
    expected = Image.registered_extensions().get(os.path.splitext(value)[1].lower(), "").replace("MPO", "JPEG")
    # What cannot be opened at all is left to the check of records, which reports why.
    return bool(expected) and image_format(content) not in (None, expected)


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
        found = os.stat(real)
        if not stat.S_ISREG(found.st_mode):
            raise BadRecord("image-missing", f"{name} is not a file")
        if found.st_size > LARGEST:
            raise BadRecord("image-size", f"{name} has {found.st_size:,} bytes: an image file may have {LARGEST:,}")
        with open(real, "rb") as file:
            return file.read()
    except (OSError, ValueError) as error:  # ValueError: a null byte, or characters that no file name can have
        if isinstance(error, BadRecord) or getattr(error, "errno", errno.ENOENT) not in _MISSING:
            raise
        raise BadRecord("image-missing", f"there is no file {name} in {root}") from None


def _is_in(path: str, folder: str) -> bool:
    return os.path.commonpath([folder, path]) == folder


def _from_url(url: str, options: ItemOptions) -> bytes:
    if not url.lower().startswith(("http://", "https://")):
        raise BadRecord("image-url", f"{shorten(url)} is not fetched: only http(s) is supported; copy the file here")
    if not options.allow_urls:
        raise BadRecord("image-url", f"{shorten(url)} is not fetched: URLs need --allow-urls")
    try:
        with ThreadPoolExecutor(1) as pool:  # this thread may have an event loop of its own, as in a notebook
            return pool.submit(asyncio.run, _download(url, options.networks)).result()
    except TimeoutError:
        problem = f"cannot be fetched: not complete within {DEADLINE:g} seconds"
        raise BadRecord("image-url", f"{shorten(url)} {problem}") from None


async def _download(url: str, allowed: Sequence[Network]) -> bytes:
    """Raises TimeoutError after ``DEADLINE``."""
    import aiohttp  # takes a third of a second, and most data sets have no URLs

    refused: list[str] = []

    def open_socket(target: tuple[Any, ...]) -> socket.socket:
        """The one place through which every connection goes, redirects included, with the address that it goes to."""
        family, kind, protocol, _, (host, *_) = target
        address = ipaddress.ip_address(host.partition("%")[0])
        if is_inside(address) and not any(address in network for network in allowed):
            refused.append(f"{address} is inside this network; --allow-networks {address} permits it")
            raise PermissionError(refused[-1])
        return socket.socket(family, kind, protocol)

    # Without the environment's proxies, which would connect to addresses unseen, and without decompression.
    session = aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT, sock_read=TIMEOUT),
        connector=aiohttp.TCPConnector(socket_factory=open_socket),
        headers={"User-Agent": "phivision", "Accept-Encoding": "identity"},
        auto_decompress=False,
    )
    problem = ""
    async with asyncio.timeout(DEADLINE), session:
        for attempt in range(TRIES):
            await asyncio.sleep(PAUSE * attempt)
            try:
                async with session.get(url, raise_for_status=True) as answer:
                    content = bytearray()
                    async for piece in answer.content.iter_any():
                        content += piece
                        if len(content) > LARGEST:
                            raise BadRecord("image-url", f"{shorten(url)} is larger than {LARGEST // 2**20} MiB")
                    return bytes(content)
            except (aiohttp.ClientError, OSError, ValueError) as error:
                if isinstance(error, BadRecord):
                    raise
                status = getattr(error, "status", None)
                problem = refused[-1] if refused else f"status {status}" if status else str(error)
                no_url = isinstance(error, ValueError | aiohttp.NonHttpUrlClientError)  # the latter of a redirect
                if refused or no_url or (status and status < 500 and status not in (408, 429)):
                    break  # trying again would not help
    raise BadRecord("image-url", f"{shorten(url)} cannot be fetched: {shorten(problem, 200)}")


def is_inside(address: Address) -> bool:
    """True for an address that the internet does not reach: loopback, private, link-local, metadata of a cloud.

    These addresses serve what only this machine should see, so no data set may name them, neither in a URL nor by a
    server's redirect or a name that resolves to them.
    """
    if isinstance(address, ipaddress.IPv6Address):
        inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF) if address in _NAT64 else address.ipv4_mapped
        if inner is not None or address not in _GLOBAL_6:
            return inner is None or is_inside(inner)
    return not address.is_global or address.is_multicast or any(address in network for network in _INSIDE)
