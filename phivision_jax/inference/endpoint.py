"""A ``Generator`` over an endpoint with OpenAI's chat API: ``phivision serve``, vLLM, SGLang, or OpenAI's own.

generator = Endpoint("http://127.0.0.1:8000/v1", "phi4-rv")
replies = generator.generate([Request("What is this?", images="cat.jpg", mode="think")])

Answers are always streamed. What an endpoint does not report is left out or estimated. Only ``phivision serve`` reports
ids (with log-probabilities), the mode and timings; elsewhere, samples have equal shares of the counts of tokens, and
all seconds of the request count as decoding. On the way, an image is always followed by a line break.
"""

import base64
import dataclasses
import http.client
import io
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from phivision_jax.images.decode import to_rgb
from phivision_jax.images.sources import ImageSource, pixels
from phivision_jax.inference.requests import (
    MAX_NEW_TOKENS,
    Delta,
    Event,
    Finished,
    Reply,
    Request,
    Timings,
    TokenLogprob,
    in_order,
)
from phivision_jax.io.messages import Log, shorten
from phivision_jax.io.retry import retry
from phivision_jax.text.chat import ESCAPE, flatten
from phivision_jax.text.constants import IMAGE_MARKER

_OPTIONAL = ("mode", "thinking_budget", "top_k", "top_p", "n", "stop")  # sent if set: some endpoints refuse the first
_FIRST_WAIT_S = 0.5


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """A ``Generator`` over HTTP."""

    url: str
    """Address of the API, as http://127.0.0.1:8000/v1."""
    model: str
    """Name of the model there."""
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Further headers of every request, such as {"Authorization": "Bearer KEY"}."""
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Further fields of every request."""
    parallel: int = 8
    """Requests of ``generate`` in flight."""
    attempts: int = 6
    """Attempts at a request that fails without being at fault: no connection, a full queue, an error of the server."""
    timeout: float = 600.0
    """Seconds without a byte after which an attempt has failed."""
    log: Log = print

    def generate(
        self, requests: Iterable[Request], advance: Callable[[int], None] = lambda _: None
    ) -> list[list[Reply]]:
        return in_order(self.as_finished(requests), advance)

    def as_finished(self, requests: Iterable[Request]) -> Finished:
        def answer(request: Request) -> list[Reply]:
            return self._retry(lambda: [e for e in self._events(self._open(request)) if isinstance(e, Reply)])

        coming, more = enumerate(requests), True
        sent: dict[Future[list[Reply]], int] = {}
        with ThreadPoolExecutor(self.parallel) as pool:
            while more or sent:
                while more and len(sent) < self.parallel:
                    i, request = next(coming, (-1, None))
                    if request is None:
                        more = False
                    else:
                        sent[pool.submit(answer, request)] = i
                for future in wait(sent, return_when=FIRST_COMPLETED).done:
                    i, error = sent.pop(future), future.exception()
                    yield i, error if isinstance(error, ValueError | OSError) else future.result()

    def stream(self, request: Request) -> Iterator[Event]:
        yield from self._events(self._retry(lambda: self._open(request)))

    def _retry[T](self, function: Callable[[], T]) -> T:
        def attempt() -> T:
            try:
                return function()
            except http.client.HTTPException as error:  # of a reply that is cut short
                raise OSError(f"{self.url}: {error!r}") from None

        return retry(attempt, self.attempts, _FIRST_WAIT_S, self.log, self.model)

    def _open(self, request: Request) -> Any:
        content = json.dumps({"model": self.model, **_body(request), **self.fields}).encode()
        headers = {"Content-Type": "application/json", **self.headers}
        try:
            call = urllib.request.Request(f"{self.url}/chat/completions", content, headers)
            return urllib.request.urlopen(call, timeout=self.timeout)
        except urllib.error.HTTPError as error:
            problem = f"{self.url}: status {error.code}, {shorten(error.read(2000).decode(errors='replace'), 500)}"
            may_succeed_later = error.code >= 500 or error.code in (408, 409, 429)
            raise (OSError if may_succeed_later else ValueError)(problem) from None

    def _events(self, response: Any) -> Iterator[Event]:
        try:
            yield from self._parse(response)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            problem = f"{self.url}: the answer does not have the form of OpenAI's API"
            raise OSError(f"{problem}: {type(error).__name__} {shorten(str(error))}") from None

    def _parse(self, response: Any) -> Iterator[Event]:
        begun, usage, received = time.monotonic(), dict[str, Any](), dict[int, list[Any]]()
        with response:
            for line in response:
                kind, _, data = line.partition(b":")
                if data.strip() == b"[DONE]":
                    break
                piece = json.loads(data) if kind == b"data" else {}
                if "error" in piece:
                    raise OSError(f"{self.url}: {shorten(piece['error'])}")
                usage = piece.get("usage") or usage
                for choice in piece.get("choices", ()):
                    received.setdefault(choice["index"], []).append(choice)
                    yield from _deltas(choice)
            else:
                raise OSError(f"{self.url}: the connection ended before the answer")
        if not received:
            raise OSError(f"{self.url}: there is no sample in the answer")
        for index in sorted(received):
            yield _reply(received[index], usage, len(received), time.monotonic() - begun)


def _deltas(choice: Mapping[str, Any]) -> list[Delta]:
    """The text of a piece of a sample."""
    delta, index, found = choice["delta"], choice["index"], (choice.get("logprobs") or {}).values()
    logprobs = tuple(_logprob(entry) for entries in found for entry in entries or ())
    thought, answer = delta.get("reasoning_content") or delta.get("reasoning"), delta.get("content")
    pieces = Delta(index, "thought", thought or "", logprobs), Delta(index, "answer", answer or "", logprobs)
    return [piece for piece in pieces if piece.text]


def _reply(choices: Sequence[Mapping[str, Any]], usage: Mapping[str, Any], n: int, seconds: float) -> Reply:
    """The reply of which these are the pieces."""
    deltas, last = [delta for choice in choices for delta in _deltas(choice)], choices[-1]
    thought, answer = ("".join(d.text for d in deltas if d.kind == kind).strip() for kind in ("thought", "answer"))
    logprobs, details = tuple(logprob for delta in deltas for logprob in delta.logprobs), last.get("phivision") or {}
    prompt, completion = (usage.get(f"{key}_tokens_details") or {} for key in ("prompt", "completion"))
    thought_tokens = details.get("thought_tokens", (completion.get("reasoning_tokens") or 0) // n)
    return Reply(
        thought=thought,
        answer=answer,
        mode=details.get("mode", "think" if thought else "nothink"),
        finish_reason="length" if last["finish_reason"] == "length" else "stop",
        ids=tuple(logprob.id for logprob in logprobs),
        prompt_tokens=usage.get("prompt_tokens", 0),
        image_tokens=prompt.get("image_tokens", 0),
        thought_tokens=thought_tokens,
        answer_tokens=details.get("answer_tokens", usage.get("completion_tokens", 0) // n - thought_tokens),
        timings=Timings(details.get("queue_s", 0), details.get("prefill_s", 0), details.get("decode_s", seconds)),
        thought_closed=details.get("thought_closed", True),
        index=last["index"],
        logprobs=logprobs,
    )


def _logprob(entry: Mapping[str, Any]) -> TokenLogprob:
    top = [(each.get("id", -1), each["logprob"]) for each in entry.get("top_logprobs") or ()]
    return TokenLogprob(entry.get("id", -1), entry["logprob"], tuple(top))


def _body(request: Request) -> dict[str, Any]:
    messages, images = request.conversation()
    plain, inline = flatten(messages)
    uris = iter([_uri(images.pop(0) if image is None else image) for image in inline])
    for message in plain:
        message["content"] = [
            {"type": "image_url", "image_url": {"url": next(uris)}}
            if piece == IMAGE_MARKER
            else {"type": "text", "text": ESCAPE.sub(lambda found: "<" + found[0][2:], piece)}
            for piece in re.split(f"({IMAGE_MARKER})\n?", message["content"])
            if piece
        ]
    body = {"messages": plain, "stream": True, "stream_options": {"include_usage": True}}
    body |= {
        "temperature": request.temperature,
        "seed": request.seed,
        "max_tokens": request.max_new_tokens or MAX_NEW_TOKENS,
    }
    body |= {name: getattr(request, name) for name in _OPTIONAL if getattr(request, name) != getattr(Request, name)}
    return body | ({} if request.logprobs is None else {"logprobs": True, "top_logprobs": request.logprobs})


def _uri(image: ImageSource) -> str:
    file = io.BytesIO()
    to_rgb(pixels(image)).save(file, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
