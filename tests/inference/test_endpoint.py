"""The generator over an OpenAI endpoint: against this project's server, and against scripted foreign ones."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from phivision_jax.inference import endpoint as endpoint_module
from phivision_jax.inference.endpoint import Endpoint
from phivision_jax.inference.requests import Delta, Reply, Request
from phivision_jax.text.chat import flatten
from tests.support.fake_generator import FakeGenerator
from tests.support.serving import served, wait_until


@pytest.fixture(scope="module")
def fake():
    return FakeGenerator(slots=4)


@pytest.fixture(scope="module")
def endpoint(fake):
    with served(fake) as address:
        yield Endpoint(f"{address}/v1", "tiny")


def local(fake: FakeGenerator, request: Request) -> list[Reply]:
    """Replies of the generator itself."""
    events: list = []
    fake.submit(request, events.append)
    wait_until(lambda: sum(isinstance(event, Reply) for event in events) == request.n)
    return sorted((event for event in events if isinstance(event, Reply)), key=lambda reply: reply.index)


@pytest.mark.parametrize(
    "settings",
    [{}, {"mode": "think"}, {"n": 3}, {"logprobs": 2, "mode": "think", "max_new_tokens": 5}, {"max_new_tokens": 1}],
)
def test_replies_equal_those_of_the_generator(endpoint, fake, settings):
    request = Request("What colour?", **settings)
    for theirs, ours in zip(endpoint.generate([request])[0], local(fake, request), strict=True):
        assert vars(theirs) == vars(ours) | {
            "ids": ours.ids if request.logprobs is not None else (),
            "timings": theirs.timings,
        }
        assert theirs.timings.decode == 0.1


def test_request_arrives_as_it_was(endpoint, fake):
    image = np.full((5, 7, 3), 9, np.uint8)
    messages = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "image", "image": image}, {"type": "text", "text": r"a <\image> <\\box>"}],
        },
        {"role": "assistant", "content": "<think>hm</think>yes"},
        {"role": "user", "content": "<image>\nand <image>\n?"},
    ]
    settings = {"temperature": 0.5, "top_p": 0.9, "top_k": 3, "seed": 5, "stop": ("x", "y"), "n": 2, "mode": "nothink"}
    settings |= {"thinking_budget": 7, "max_new_tokens": 2, "logprobs": 1}
    sent = Request(messages, [image, image], **settings)
    endpoint.generate([sent])
    arrived = fake.submitted[-1]
    assert {name: getattr(arrived, name) for name in settings} == settings
    assert flatten(arrived.messages)[0] == flatten(messages)[0]
    assert fake.images[-3:] == [(7, 5)] * 3


def test_answers_are_in_order_and_counted(endpoint):
    done: list[int] = []
    replies = endpoint.generate([Request("x", max_new_tokens=1 + i % 3) for i in range(20)], done.append)
    assert [len(samples[0].answer.split()) for samples in replies] == [1 + i % 3 for i in range(20)]
    assert done == [1] * 20


def test_errors_take_the_place_of_replies(endpoint):
    asked = [Request("x"), Request("x" * 20_000), Request("y")]
    outcomes = dict(endpoint.as_finished(iter(asked)))
    assert sorted(outcomes) == [0, 1, 2] and "20000 tokens" in str(outcomes[1])
    assert [outcomes[i][0].answer for i in (0, 2)] == ["a red car"] * 2


def test_requests_are_taken_a_few_before_their_turn(endpoint):
    taken: list[int] = []

    def requests():
        for i in range(50):
            taken.append(i)
            yield Request("x")

    for done, _ in enumerate(endpoint.as_finished(requests())):
        assert len(taken) <= done + 1 + endpoint.parallel


def test_stream(endpoint):
    *deltas, reply = endpoint.stream(Request("What colour?", mode="think"))
    assert all(isinstance(delta, Delta) for delta in deltas) and isinstance(reply, Reply)
    assert "".join(d.text for d in deltas if d.kind == "thought").strip() == reply.thought == "let me see"
    assert "".join(d.text for d in deltas if d.kind == "answer").strip() == reply.answer == "a red car"


def test_closing_the_stream_cancels_the_request():
    slow = FakeGenerator(slots=1, answer="word " * 10_000, waits=0.01)
    with served(slow) as address:
        events = Endpoint(f"{address}/v1", "tiny").stream(Request("x"))
        next(events)
        events.close()
        wait_until(lambda: slow.cancelled == 1 and not slow.active)


def test_refused_request_is_named_and_not_repeated(endpoint, fake):
    before, logged = len(fake.submitted), []
    with pytest.raises(ValueError, match=r"request 1: .*status 400.*20000 tokens"):
        Endpoint(endpoint.url, "tiny", log=logged.append).generate([Request("x"), Request("x" * 20_000)])
    assert len(fake.submitted) == before + 1 and not logged


@contextlib.contextmanager
def scripted(*replies: tuple[int, str]) -> Iterator[tuple[str, list[tuple[dict, dict]]]]:
    """An endpoint that gives these replies in turn; and what it received: (headers, body)."""
    received, left = [], list(replies)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            received.append((dict(self.headers), body))
            status, text = left.pop(0)
            self.send_response(status)
            if text.endswith("…"):  # cut short
                self.send_header("Transfer-Encoding", "chunked")
                text = f"ff\r\n{text}"
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", received
        server.shutdown()


def sse(*pieces: dict) -> str:
    return "".join(f"data: {json.dumps(piece)}\n\n" for piece in pieces)


def piece(finish: str | None = None, **delta: str) -> dict:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


def test_foreign_endpoint():
    """One that names thoughts otherwise, sends comments, and reports only the totals of tokens."""
    usage = {"prompt_tokens": 5, "completion_tokens": 9, "completion_tokens_details": {"reasoning_tokens": 6}}
    pieces = (
        piece(role="assistant"),
        piece(reasoning="hm "),
        piece("length", content=" Hi"),
        {"choices": [], "usage": usage},
    )
    with scripted((200, ": ping\n\n" + sse(*pieces) + "data: [DONE]\n\n")) as (url, received):
        endpoint = Endpoint(url, "m", headers={"Authorization": "Bearer key"}, fields={"max_tokens": 3})
        ((reply,),) = endpoint.generate([Request("x")])
    assert (reply.thought, reply.answer, reply.mode, reply.finish_reason) == ("hm", "Hi", "think", "length")
    assert (reply.prompt_tokens, reply.thought_tokens, reply.answer_tokens) == (5, 6, 3)
    headers, body = received[0]
    assert headers["Authorization"] == "Bearer key"
    assert body.keys() == {"model", "messages", "stream", "stream_options", "temperature", "seed", "max_tokens"}
    assert body["max_tokens"] == 3


@pytest.mark.parametrize(
    "failure, reported",
    [
        ((429, "queue"), "status 429, queue"),
        ((503, "later"), "status 503, later"),
        ((200, sse(piece(content="a"), {"error": {"message": "gone"}})), "gone"),
        ((200, sse(piece(content="a"))), "ended before the answer"),
        ((200, ""), "ended before the answer"),
        ((200, "data: [DONE]\n\n"), "there is no sample in the answer"),
        ((200, 'data: {"choices": 5}\n\n'), "does not have the form of OpenAI's API"),
        ((200, "data: <html>\n\n"), "does not have the form of OpenAI's API"),
        ((200, sse({"choices": [{"index": 0}]}) + "data: [DONE]\n\n"), "does not have the form of OpenAI's API"),
        ((200, sse(piece(content="a")) + "…"), "IncompleteRead"),
    ],
)
def test_failure_is_tried_again(failure, reported, monkeypatch):
    monkeypatch.setattr(endpoint_module, "_FIRST_WAIT_S", 0)
    logged: list[str] = []
    good = 200, sse(piece("stop", content="Hi")) + "data: [DONE]\n\n"
    with scripted(failure, failure, good) as (url, received):
        endpoint = Endpoint(url, "m", log=logged.append)
        assert endpoint.generate([Request("x")])[0][0].answer == "Hi"
    assert len(received) == 3 and len(logged) == 2 and reported in logged[0]


def test_failure_that_stays_is_raised(monkeypatch):
    monkeypatch.setattr(endpoint_module, "_FIRST_WAIT_S", 0)
    with scripted(*[(500, "no")] * 2) as (url, _), pytest.raises(OSError, match="status 500, no"):
        Endpoint(url, "m", attempts=2, log=lambda _: None).generate([Request("x")])
