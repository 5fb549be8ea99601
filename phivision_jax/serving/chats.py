"""The endpoint ``/v1/chat/completions``.

    admitted (else 429) ─► body read ─► worker thread: JSON, images, submission ─► events ─► one answer, or a stream

At each stage an error or a client that disconnects ends the request and frees its slot. In a stream, an error after the
submission is its last piece.
"""

import asyncio
import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from phivision_jax.inference.local import LocalGenerator, Ticket
from phivision_jax.inference.requests import Event, Reply, Request
from phivision_jax.io.messages import shorten
from phivision_jax.serving.metrics import Metrics
from phivision_jax.serving.protocol import ApiError, Chat, Limits, read_chat

_log = logging.getLogger("phivision.serve")
_WORKERS = 2  # threads that decode images: each may need the memory of one
_POLL_S = 0.25  # between two looks at a connection
_MAX_WARNINGS = 100  # names of ignored fields that are remembered
DETAILS = "phivision.details"
"""Key of an ASGI scope: a list of texts for the log line of the request."""


class Exchange:
    """A request at the engine.

    Attributes:
      events: of the request, at last the exception that ended the engine. They have no limit of their own: a client
        that does not take them is disconnected after ``Limits.client_seconds``, and the engine makes at most as many as
        its slots have positions.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.events: asyncio.Queue[Event | Exception] = asyncio.Queue()
        self._ticket: Ticket | None = None
        self._cancelled = False

    def submit(self, generator: LocalGenerator, request: Request) -> None:
        """Hand the request to the engine; called on a worker thread."""
        if not self._cancelled:
            self._ticket = generator.submit(request, self._put)
        if self._cancelled:  # meanwhile, when there was no ticket yet
            self.cancel()

    def cancel(self) -> None:
        """End the request now or as soon as it has been submitted; its samples end with what there is."""
        self._cancelled = True
        if self._ticket:
            self._ticket.cancel()

    def _put(self, event: Event | Exception) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has been closed
            self._loop.call_soon_threadsafe(self.events.put_nowait, event)


async def while_connected[T](http: HTTPRequest, work: Awaitable[T]) -> T:
    """The result of work, which is cancelled when the client disconnects.

    Args:
      http: a request whose body has been read.

    Raises:
      ClientDisconnect: if it did.
    """
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait({task}, timeout=_POLL_S))[0]:
            if await http.is_disconnected():
                raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()


@dataclasses.dataclass
class Chats:
    """An ASGI application that answers chat requests."""

    generator: LocalGenerator
    name: str
    """Name of the model for clients."""
    token_text: Callable[[int], str]
    """Text of a token id, for log-probabilities."""
    limits: Limits = Limits()
    failed: bool = False
    """The engine's last request ended with an error."""

    def __post_init__(self) -> None:
        self.metrics = Metrics()
        self._workers = ThreadPoolExecutor(_WORKERS, "prepare")
        self._capacity = int(self.generator.stats()["slots"]) + self.limits.max_queue
        self._warned: set[str] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        metrics, samples, exchange, begun = self.metrics, 1, Exchange(), time.monotonic()
        http, loop = HTTPRequest(scope, receive), asyncio.get_running_loop()
        if metrics.in_flight >= self._capacity:
            raise ApiError(429, "the queue is full: try again later", "queue_full")
        metrics.in_flight += samples
        timer = loop.call_later(self.limits.max_seconds, exchange.cancel)
        try:
            body = await self._body(http)
            prepared = loop.run_in_executor(self._workers, self._prepare, body, exchange)
            chat = await while_connected(http, prepared)
            metrics.in_flight += chat.request.n - samples
            samples = chat.request.n
            scope[DETAILS].append(chat)
            events = self._events(chat, exchange)
            if chat.stream:
                response: Response = StreamingResponse(_pieces(chat, events), media_type="text/event-stream")
            else:
                response = JSONResponse(await while_connected(http, _completion(chat, events)))
            await response(scope, receive, send)
        finally:
            timer.cancel()
            exchange.cancel()
            metrics.in_flight -= samples
            metrics.time("request", time.monotonic() - begun)

    async def _body(self, http: HTTPRequest) -> bytes:
        # A form or a text may be posted by the page of any site without the browser asking; JSON may not.
        if http.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "the content type must be application/json")
        body, limit, seconds = bytearray(), self.limits.max_body_bytes, self.limits.client_seconds
        try:
            async with asyncio.timeout(seconds):
                async for chunk in http.stream():
                    body += chunk
                    if len(body) > limit:
                        raise ApiError(413, f"the request has more than {limit:,} bytes, the limit of this server")
        except TimeoutError:
            raise ApiError(408, f"the request did not arrive within {seconds:g} seconds") from None
        return bytes(body)

    def _prepare(self, body: bytes, exchange: Exchange) -> Chat:
        """Read the request and submit it; on a worker thread, since JSON and images take a while."""
        try:
            chat = read_chat(body, self.name, self.limits, self.token_text, self._warn)
            exchange.submit(self.generator, chat.request)
        except ValueError as error:  # also of the engine: the prompt is too long, or an image is damaged
            raise ApiError(400, str(error)) from None
        return chat

    def _warn(self, field: str) -> None:
        if field not in self._warned and len(self._warned) < _MAX_WARNINGS:
            self._warned.add(field)
            _log.warning("the field %s of a request has no meaning here and is ignored", shorten(field))

    async def _events(self, chat: Chat, exchange: Exchange) -> AsyncIterator[Event]:
        """Events until all samples have ended.

        Raises:
          ApiError: when the engine failed, or a sample was cancelled before its first token.
        """
        while len(chat.replies) < chat.request.n:
            event = await exchange.events.get()
            self.failed = isinstance(event, Exception)
            if isinstance(event, Exception):
                _log.error("the engine failed", exc_info=event)
                raise ApiError(500, "the engine of this server failed; its log has the details")
            if isinstance(event, Reply):
                chat.replies.append(event)
                self.metrics.observe(event)
                if event.finish_reason == "cancelled" and not event.ids:  # by the limit of time, or a shutdown
                    raise ApiError(503, "there was no time left before the first token")
            yield event


async def _completion(chat: Chat, events: AsyncIterator[Event]) -> dict[str, Any]:
    async for _ in events:
        pass
    return chat.completion()


async def _pieces(chat: Chat, events: AsyncIterator[Event]) -> AsyncIterator[str]:
    try:
        async for event in events:
            yield _sse(chat.piece(event))
        yield (_sse(chat.end()) if chat.include_usage else "") + "data: [DONE]\n\n"
    except ApiError as error:
        yield _sse(error.body)


def _sse(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"
