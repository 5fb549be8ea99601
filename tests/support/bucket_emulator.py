"""A bucket on this machine: Google's storage API over loopback, in a process of its own, with objects in its memory.

``with Emulator() as emulator:`` serves ``gs://bucket`` to processes with ``emulator.environment``.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from email.parser import BytesParser
from http import HTTPStatus
from typing import Any, Self


class Emulator:
    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        url = f"http://127.0.0.1:{self.port}"
        self.environment = {
            "STORAGE_EMULATOR_HOST": url,  # gcsfs
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks Google what kind of bucket it is
            "NO_GCE_CHECK": "true",
        }
        self.process = subprocess.Popen([sys.executable, __file__, str(self.port)], stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                assert self.process.poll() is None and time.monotonic() < deadline, "the emulator does not start"
                time.sleep(0.02)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def freeze(self) -> None:
        """It accepts connections and never answers."""
        self.process.send_signal(signal.SIGSTOP)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()


def serve(port: int) -> None:
    from http import server

    from gcp_storage_emulator import server as emulated
    from gcp_storage_emulator import server as emulator
    from gcp_storage_emulator.storage import Storage

    server.HTTPServer.request_queue_size = 256  # the default is 5; a connection beyond it waits for a second
    emulated.BytesParser = WholeParts
    Storage._write_config_to_file = lambda self: None  # all that it knows of every object, at each one that is written
    emulator.HANDLERS = ((MOVE, {"POST": move}), *emulator.HANDLERS)
    for _, methods in emulator.HANDLERS:
        for method, handler in methods.items():
            methods[method] = with_generations(handler)
    emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket").start()
    time.sleep(3600)


class WholeParts(BytesParser):
    """gcsfs ends a part with a bare LF; where its content ends with CR, the two would be taken for one line's end."""

    def parsebytes(self, text: bytes | bytearray, headersonly: bool = False) -> Any:
        return super().parsebytes(text.replace(b"\n--==0==", b"\r\n--==0=="), headersonly)


MOVE = r"^/storage/v1/b/(?P<bucket_name>[-.\w]+)/o/(?P<object_id>.*[^/]+)/moveTo/o/(?P<dest_object_id>.*[^/]+)$"


def move(request: Any, response: Any, storage: Any) -> None:
    """The emulator lacks it; gcsfs falls back to copying, but only after half a minute of trying."""
    from gcp_storage_emulator.handlers import objects

    request.params["dest_bucket_name"] = request.params["bucket_name"]
    objects.copy(request, response, storage)
    if response.status == HTTPStatus.OK:
        objects.delete(request, response, storage)


def with_generations(handler: Callable[..., None]) -> Callable[..., None]:
    """Add what the emulator lacks and TensorStore needs: generations of objects, in answers and in conditions."""
    from gcp_storage_emulator.exceptions import NotFound

    def name_of(request: Any) -> str:
        if request.query.get("uploadType") == ["multipart"]:
            return request.data["meta"]["name"]
        return (request.params or {}).get("object_id") or request.query.get("name", [""])[0]

    def generation(request: Any, storage: Any) -> str:
        try:
            return str(storage.get_file_obj(request.params["bucket_name"], name_of(request))["generation"])
        except NotFound:
            return "0"

    def handle(request: Any, response: Any, storage: Any) -> None:
        named = name_of(request)
        now = generation(request, storage) if named else "0"
        if request.query.get("ifGenerationMatch", [now]) != [now]:
            response.status = HTTPStatus.PRECONDITION_FAILED
        elif request.query.get("ifGenerationNotMatch") == [now]:
            response.status = HTTPStatus.NOT_MODIFIED
        else:
            handler(request, response, storage)
        if named:
            response["x-goog-generation"] = generation(request, storage)

    return handle


if __name__ == "__main__":
    serve(int(sys.argv[1]))
