from __future__ import annotations

import asyncio
import base64
import contextlib
import gzip
import http.server
import io
import ipaddress
import os
import socket
import threading
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from phivision_jax.data.quarantine import BadRecord
from phivision_jax.data.sources import fetch as fetching
from phivision_jax.data.sources.item_options import ItemOptions
from tests.support.records import png

PNG = png(24, 16)


def encoded(format: str, **options) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, format, **options)
    return file.getvalue()


def fetch(value, folder: Path, **options) -> bytes:
    return fetching.fetch(value, folder, ItemOptions(**options))


def reason(value, folder: Path, **options) -> str:
    with pytest.raises(BadRecord) as caught:
        fetch(value, folder, **options)
    return caught.value.reason


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "outside.png").write_bytes(PNG)
    folder = tmp_path / "images"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "1.png").write_bytes(PNG)
    return folder


def test_fetch_paths_inside_folder(folder):
    for path in ("a/1.png", "./a/../a/1.png", "../images/a/1.png", str(folder / "a" / "1.png")):
        assert fetch(path, folder) == PNG
        assert fetch({"path": path, "bytes": None}, folder) == PNG
    assert fetch({"path": "a/1.png", "bytes": b"x"}, folder) == b"x"
    (folder.parent / "link").symlink_to(folder)
    assert fetch(str(folder / "a" / "1.png"), folder.parent / "link") == PNG, "the folder itself may be a link"
    (folder / "b.png").symlink_to(folder / "a" / "1.png")
    assert fetch("b.png", folder) == PNG


def test_fetch_rejects_paths_out_of_folder(folder):
    (folder / "file.png").symlink_to(folder.parent / "outside.png")
    (folder / "up").symlink_to(folder.parent)
    beside = folder.parent / "images2"  # Begins with the folder's name.
    beside.mkdir()
    (beside / "1.png").write_bytes(PNG)
    outside = str(folder.parent / "outside.png")
    for path in (
        "../outside.png",
        outside,
        "file.png",
        "up/outside.png",
        "../images2/1.png",
        "../missing.png",
        "/etc/passwd",
    ):
        assert reason(path, folder) == "image-path", path


def test_fetch_also_allow_permits_link_targets(folder):
    (folder / "file.png").symlink_to(folder.parent / "outside.png")
    with pytest.raises(BadRecord, match=r"outside\.png, by a symbolic link: --also-allow"):
        fetch("file.png", folder)
    with pytest.raises(BadRecord, match=r"leads out of the image folder \S+$"):
        fetch("../outside.png", folder)
    assert fetch("file.png", folder, also_allow=(folder / "a", folder.parent)) == PNG
    assert reason("file.png", folder, also_allow=(folder / "a",)) == "image-path"
    (folder.parent / "named").symlink_to(folder.parent)
    assert fetch("file.png", folder, also_allow=(folder.parent / "named",)) == PNG, "the named folder may be a link"


def test_fetch_missing_files(folder):
    (folder / "loop").symlink_to(folder / "loop")
    os.mkfifo(folder / "pipe.png")
    for path in ("missing.png", "a", "a/1.png/2.png", "a\0b.png", "x" * 5000, "x/" * 3000, "loop", "pipe.png", "."):
        assert reason(path, folder) == "image-missing", path[:20]


def test_fetch_raises_disk_errors(folder, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(fetching, "open", fail, raising=False)
    with pytest.raises(OSError, match="Input/output"):
        fetch("a/1.png", folder)


@pytest.mark.parametrize(
    "name, content, other",
    [
        ("x.png", encoded("JPEG"), True),
        ("x.jpg", PNG, True),
        ("x.JPG", encoded("JPEG"), False),
        ("x.jpeg", encoded("JPEG"), False),
        ("x.jpg", encoded("MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))]), False),
        ("x.mpo", encoded("JPEG"), False),
        ("x.gif", encoded("WEBP"), True),
        ("x.webp", encoded("WEBP"), False),
        ("x.tif", encoded("TIFF"), False),
        ("x.bin", PNG, False),
        ("x", PNG, False),
        ("x.png", b"", False),  # not an image at all: the check of records reports why
        ("x.png", PNG[:10], False),
    ],
)
def test_content_decides_about_format(folder, name, content, other):
    (folder / name).write_bytes(content)
    assert fetch(name, folder) == content
    assert fetching.other_format(name, content) is other
    assert not fetching.other_format({"bytes": content, "path": name}, content), "the name in a struct is no path"


def test_fetch_limits_size(folder, monkeypatch):
    monkeypatch.setattr(fetching, "LARGEST", 1000)
    (folder / "large.png").write_bytes(b"x" * 1001)
    (folder / "sparse.png").write_bytes(b"")
    os.truncate(folder / "sparse.png", 2**40)
    uri = "data:;base64," + base64.b64encode(b"x" * 1001).decode()
    for value in ("large.png", "sparse.png", b"x" * 1001, {"bytes": b"x" * 1001}, uri, "data:," + "x" * 1001):
        assert reason(value, folder) == "image-size"
    assert fetch(b"x" * 1000, folder) == b"x" * 1000


def test_fetch_data_uris(folder):
    text = base64.b64encode(PNG).decode()
    assert fetch(f"data:image/png;base64,{text}", folder) == PNG
    assert fetch(f"DATA:image/jpeg;charset=x;BASE64,{text[:9]}\n {text[9:]}", folder) == PNG
    assert fetch("data:,a%20b", folder) == b"a b"
    assert reason(f"data:image/png;base64,{text[:-5]}", folder) == "image-broken"
    assert reason("data:image/png;base64,!!!!", folder) == "image-broken"
    assert reason("data:image/png;base64", folder) == "image-broken"


@pytest.mark.parametrize("value", [5, [PNG], {"bytes": None}, {"x": 1}, {"bytes": 5}, 1.5])
def test_fetch_rejects_other_types(folder, value):
    assert reason(value, folder) == "fields"


class Handler(http.server.BaseHTTPRequestHandler):
    asked: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.asked.append(self.path)
        status, headers, body = 200, {}, PNG
        if self.path == "/big":
            body = b"x" * 5000
        elif self.path == "/missing":
            status = 404
        elif self.path == "/busy" and self.asked.count("/busy") < 3:
            status = 503
        elif self.path == "/down":
            status = 500
        elif self.path == "/moved":
            status, headers = 302, {"Location": "/fine.jpg"}
        elif self.path == "/to-file":
            status, headers = 302, {"Location": "file:///etc/passwd"}
        elif self.path == "/to-ftp":
            status, headers = 302, {"Location": "ftp://127.0.0.1/x"}
        elif self.path == "/inward":
            status, headers = 302, {"Location": f"http://127.0.0.2:{self.server.server_address[1]}/fine.jpg"}
        elif self.path == "/compressed":
            headers, body = {"Content-Encoding": "gzip"}, gzip.compress(bytes(10**6))
        elif self.path.startswith("/slow"):
            return self.drip()
        self.send_response(status)
        length = len(body) + 9 * (self.path == "/short")
        for name, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def drip(self) -> None:
        """Send a byte every 0.05 s, of the headers or the body, so that no read waits for long."""
        head = b"HTTP/1.0 200 OK\r\nContent-Length: 40\r\n"
        self.wfile.write(head + b"\r\n" if self.path == "/slow-body" else head + b"X: ")
        with contextlib.suppress(ConnectionError):  # the client gives up
            for _ in range(40):
                time.sleep(0.05)
                self.wfile.write(b"x")
            self.wfile.write(b"\r\n\r\n")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(fetching, "PAUSE", 0.0)
    monkeypatch.setattr(fetching, "LARGEST", 4000)
    monkeypatch.setattr(fetching, "TIMEOUT", 5.0)
    Handler.asked.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


URLS = {"allow_urls": True, "allow_networks": ("127.0.0.1",)}


def test_fetch_urls(server, folder):
    assert reason(f"{server}/fine.jpg", folder) == "image-url" and not Handler.asked, "URLs are not fetched by default"
    for path, tries in (("/fine.jpg", 1), ("/busy", 3), ("/moved", 1)):
        assert fetch({"url": server + path}, folder, **URLS) == PNG
        assert Handler.asked.count(path) == tries
    for path, tries in (("/big", 1), ("/missing", 1), ("/down", 3), ("/short", 3), ("/to-file", 1), ("/to-ftp", 1)):
        assert reason(server + path, folder, **URLS) == "image-url"
        assert Handler.asked.count(path) == tries, path
    assert len(fetch(f"{server}/compressed", folder, **URLS)) < 2000, "what a server compresses is not decompressed"


@pytest.mark.parametrize("path", ["/slow-body", "/slow-headers"])
def test_fetch_url_deadline(server, folder, monkeypatch, path):
    monkeypatch.setattr(fetching, "DEADLINE", 0.3)
    begin = time.monotonic()
    with pytest.raises(BadRecord, match=r"not complete within 0\.3 seconds"):
        fetch(server + path, folder, **URLS)
    assert time.monotonic() - begin < 1.5, "all of it would take 2 seconds"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1", "localhost", "0x7f000001", "2130706433", "[::ffff:127.0.0.1]"])
def test_fetch_refuses_addresses_inside(server, folder, monkeypatch, host):
    monkeypatch.setenv("http_proxy", server)  # would connect on behalf of this machine
    with pytest.raises(BadRecord, match=r"inside this network; --allow-networks|not a canonical IPv4 address"):
        fetch(server.replace("127.0.0.1", host) + "/fine.jpg", folder, allow_urls=True)
    assert not Handler.asked


def test_fetch_refuses_redirect_inside(server, folder):
    with pytest.raises(BadRecord, match=r"127\.0\.0\.2 is inside this network"):
        fetch(f"{server}/inward", folder, **URLS)
    assert Handler.asked == ["/inward"]


def test_fetch_checks_address_that_it_connects_to(server, folder, monkeypatch):
    """A name that resolves to another address at each look-up (DNS rebinding) is looked up once."""
    port = int(server.rpartition(":")[2])
    answers: Iterator[str] = iter([])
    looked_up, connected = [], []

    def getaddrinfo(host, *_, **__):
        looked_up.append(next(answers))
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (looked_up[-1], port))]

    async def connect(self, sock, address):
        connected.append(address[0])
        raise ConnectionRefusedError(111, "refused")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(asyncio.selector_events.BaseSelectorEventLoop, "sock_connect", connect)
    for public, private in ((["93.184.215.14"] * 3, "127.0.0.1"), ([], "127.0.0.1")):
        answers = iter([*public[:1], private, private, private])
        looked_up.clear(), connected.clear()
        assert reason(f"http://rebind.test:{port}/fine.jpg", folder, allow_urls=True) == "image-url"
        assert (len(looked_up), connected) == (1, public)


@pytest.mark.parametrize(
    "address, inside",
    [
        ("127.0.0.1", True),
        ("0.0.0.0", True),
        ("10.1.2.3", True),
        ("172.16.0.1", True),
        ("192.168.0.1", True),
        ("100.100.100.200", True),  # metadata of a cloud, as are the next three
        ("169.254.169.254", True),
        ("192.0.0.192", True),
        ("168.63.129.16", True),
        ("224.0.0.1", True),
        ("255.255.255.255", True),
        ("::", True),
        ("::1", True),
        ("::127.0.0.1", True),
        ("::ffff:10.0.0.1", True),
        ("64:ff9b::7f00:1", True),
        ("64:ff9b::a9fe:a9fe", True),
        ("64:ff9b:1::808:808", True),
        ("2002:7f00:1::", True),
        ("2001:0:7f00:1::", True),
        ("fe80::1", True),
        ("fd00:ec2::254", True),
        ("ff02::1", True),
        ("8.8.8.8", False),
        ("::ffff:8.8.8.8", False),
        ("64:ff9b::808:808", False),
        ("2606:4700::1111", False),
    ],
)
def test_is_inside(address, inside):
    assert fetching.is_inside(ipaddress.ip_address(address)) is inside


def test_allow_networks_needs_addresses():
    with pytest.raises(ValueError, match="--allow-networks: 'my-server' does not appear"):
        ItemOptions(allow_networks=("my-server",)).check()


@pytest.mark.parametrize(
    "url",
    ["gs://bucket/x", "ftp://127.0.0.1/x", "http://", "http://127.0.0.1:1/x", "s3://bucket/x", "http://[::1/x"],
)
def test_fetch_rejects_bad_urls(folder, monkeypatch, url):
    monkeypatch.setattr(fetching, "PAUSE", 0.0)
    assert reason(url, folder, allow_urls=True) == "image-url"
    assert reason(url, folder) == "image-url"


@pytest.mark.parametrize(
    "given",
    [
        "sub\\new photo é.png",
        ".\\sub\\new photo é.png",
        "sub/new%20photo%20%C3%A9.png",
        "sub%2Fnew%20photo%20e%CC%81.png",
        "sub\\new%20photo%20%C3%A9.png",
        unicodedata.normalize("NFD", "sub/new photo é.png"),
        "file:sub/new%20photo%20%C3%A9.png",
        "file://FOLDER/sub/new%20photo%20%C3%A9.png",
        "FILE://localhost/FOLDER/sub/new photo é.png",
        "file:FOLDER/sub/new%20photo%20e%CC%81.png",
    ],
)
def test_fetch_takes_other_spellings_of_a_path(folder, given):
    (folder / "sub").mkdir(exist_ok=True)
    (folder / "sub" / "new photo é.png").write_bytes(PNG)
    given = given.replace("localhost/FOLDER", f"localhost{folder}").replace("FOLDER", str(folder))
    assert fetch(given, folder) == PNG
    assert fetch({"path": given}, folder) == PNG


def test_fetch_prefers_the_spelling_as_it_is(folder):
    (folder / "a%20b.png").write_bytes(PNG)
    (folder / "a b.png").write_bytes(b"other")
    assert fetch("a%20b.png", folder) == PNG


@pytest.mark.parametrize(
    "given", ["file:///etc/passwd", "file:/etc/passwd", "file://localhost/etc/passwd", "file:%2e%2e/secret.png"]
)
def test_file_urls_stay_inside_the_folder(folder, given):
    (folder.parent / "secret.png").write_bytes(PNG)
    with pytest.raises(BadRecord, match="leads out of the image folder") as error:
        fetch(given, folder)
    assert error.value.reason == "image-path"


@pytest.mark.parametrize("given", ["..\\secret.png", "%2e%2e/secret.png", "sub\\..\\..\\secret.png"])
def test_other_spellings_stay_inside_the_folder(folder, given):
    (folder.parent / "secret.png").write_bytes(PNG)
    with pytest.raises(BadRecord, match="there is no file"):
        fetch(given, folder)


@pytest.mark.parametrize("url", ["gs://b/a.png", "s3://b/a.png", "hf://datasets/a.png", "zip://a.png::b.zip"])
@pytest.mark.parametrize("allowed", [False, True])
def test_fetch_of_other_schemes_names_the_supported_ones(folder, url, allowed):
    with pytest.raises(BadRecord, match=r"only http\(s\) is supported; copy the file here"):
        fetch(url, folder, allow_urls=allowed)


@pytest.mark.parametrize(
    "given", ["x" * 200_000, "../" + "x/" * 100_000, "http://a/" + "x" * 200_000, "s3://" + "x" * 200_000]
)
def test_fetch_shortens_values_in_errors(folder, given):
    with pytest.raises(BadRecord) as error:
        fetch(given, folder)
    assert len(str(error.value)) < 300 + len(str(folder))
