"""A server on loopback in a thread of this process, and a raw HTTP client for what no library would send."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

import uvicorn

from phivision_jax.inference.local import LocalGenerator
from phivision_jax.serving.app import create_app
from phivision_jax.serving.chats import Chats
from phivision_jax.serving.protocol import Limits


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait for a condition; fail when it does not come true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not come true"
        time.sleep(0.005)


@contextlib.contextmanager
def served(
    generator: LocalGenerator,
    limits: Limits = Limits(),  # noqa: B008
    hosts: Collection[str] = (),
) -> Iterator[str]:
    """The address of a server with the model "tiny"; token i has the text "<i>"."""
    app = create_app(Chats(generator, "tiny", lambda i: f"<{i}>", limits), hosts)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        config = uvicorn.Config(app, loop="asyncio", http="h11", ws="none", log_config=None, log_level="critical")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            wait_until(lambda: server.started)
            yield "http://{}:{}".format(*listening.getsockname())
        finally:
            server.should_exit = True
            thread.join()


def post(address: str, body: bytes, content_type: str = "application/json", **headers: str) -> socket.socket:
    """Send a chat request on a socket of its own, and leave the reply unread."""
    host, _, port = address.removeprefix("http://").partition(":")
    connection = socket.create_connection((host, int(port)), timeout=60)
    lines = {"Host": f"{host}:{port}", "Content-Type": content_type, "Content-Length": str(len(body))}
    lines |= {name.replace("_", "-"): value for name, value in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items() if value)
    connection.sendall(f"POST /v1/chat/completions HTTP/1.1\r\n{head}\r\n".encode() + body)
    return connection


def read_reply(connection: socket.socket) -> tuple[int, dict[str, Any]]:
    """Status and JSON of a reply."""
    received = b""
    while b"\r\n\r\n" not in received:
        received += connection.recv(65536)
    head, _, body = received.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
    while len(body) < length:
        body += connection.recv(65536)
    return int(head.split()[1]), json.loads(body)
