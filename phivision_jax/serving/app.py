"""The application: routes, errors, headers, and one log line per request.

Guard: Host, headers, time to send, log line
  └─ Starlette: /v1/chat/completions  /v1/models  /health  /metrics  / (the page)
"""

import asyncio
import ipaddress
import logging
import mimetypes
import time
import urllib.parse
from collections.abc import Collection
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from phivision_jax.io.messages import shorten
from phivision_jax.serving.chats import DETAILS, Chats
from phivision_jax.serving.protocol import ApiError

_log = logging.getLogger("phivision.serve")
_PAGE = Path(__file__).parent / "page"
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def create_app(chats: Chats, hosts: Collection[str] = ()) -> ASGIApp:
    """The ASGI application of a server.

    Args:
      hosts: names under which clients reach the server, beside localhost and IP addresses; "*" for any.
    """

    async def health(_: Request) -> Response:
        return JSONResponse({"status": "failed" if chats.failed else "ok"}, 503 if chats.failed else 200)

    async def metrics(_: Request) -> Response:
        return PlainTextResponse(chats.metrics.text(chats.generator.stats()))

    model = {"id": chats.name, "object": "model", "created": int(time.time()), "owned_by": "phivision_jax"}
    fixed: dict[str, ASGIApp] = {}
    for file in _PAGE.iterdir():
        content = Response(file.read_bytes(), media_type=mimetypes.guess_type(file.name)[0])
        fixed["/" + file.name.replace("index.html", "")] = content
    fixed |= {"/v1/models": JSONResponse({"object": "list", "data": [model]})}
    routes = [Route(path, content, methods=["GET"]) for path, content in fixed.items()]
    routes += [Route("/health", health), Route("/metrics", metrics)]
    routes += [Route("/v1/chat/completions", chats, methods=["POST"])]
    handlers: Any = dict.fromkeys((ApiError, HTTPException, Exception), _error)
    return Guard(Starlette(routes=routes, exception_handlers=handlers), chats, hosts)


async def _error(http: Request, error: Exception) -> Response:
    """Any exception in the shape of the API."""
    if isinstance(error, HTTPException):  # of the router
        error = ApiError(error.status_code, f"{http.method} {shorten(http.url.path)}: {error.detail}")
    elif not isinstance(error, ApiError):
        _log.error("a fault of the server", exc_info=error)
        error = ApiError(500, "a fault of the server; its log has the details")
    return JSONResponse(error.body, error.status, error.headers)


class Guard:
    """Checks the Host header of every request, adds headers to the reply, limits the time to send it, and logs it.

    A page of another site can neither read replies, which have no CORS headers, nor post JSON. Under a name that first
    has the address of its own server and then this one's (DNS rebinding), it would be a page of this site; so only
    expected names are answered.
    """

    def __init__(self, app: ASGIApp, chats: Chats, hosts: Collection[str]) -> None:
        self._app, self._limits, self._metrics = app, chats.limits, chats.metrics
        self._hosts = {"localhost", *(host.lower() for host in hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun, status, details = time.monotonic(), 0, list[Any]()

        async def guarded_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(_HEADERS)
            try:
                async with asyncio.timeout(self._limits.client_seconds):
                    await send(message)
            except TimeoutError:
                raise ClientDisconnect from None

        try:
            if self._is_expected(host := Headers(scope=scope).get("host", "")):
                await self._app({**scope, DETAILS: details}, receive, guarded_send)
            else:
                error = ApiError(421, f"this server is not known as {shorten(host)}: allow the name with --hosts")
                await JSONResponse(error.body, error.status)(scope, receive, guarded_send)
        except ClientDisconnect:
            details.append("disconnected")
        finally:
            self._metrics.count(f'responses_total{{status="{status}"}}')
            if scope["method"] != "GET" or status >= 400:
                line = f"{scope['method']} {shorten(scope['path'])} {status} {time.monotonic() - begun:.3f} s"
                _log.info("%s", ", ".join(map(str, [line, *details])))

    def _is_expected(self, host: str) -> bool:
        try:
            name = urllib.parse.urlsplit(f"//{host}").hostname or ""
            return not self._hosts.isdisjoint((name, "*")) or ipaddress.ip_address(name) is not None
        except ValueError:
            return False
