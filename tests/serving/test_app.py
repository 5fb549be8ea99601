"""The server through the official client, and through raw sockets for what that client would not send.

The generator is a fake; ``test_server_with_engine.py`` has the real one.
"""

from __future__ import annotations

import base64
import http.client
import json
import logging
import socket
import threading
import urllib.parse

import openai
import pytest

from phivision_jax.serving.protocol import Limits
from tests.support.bombs import png
from tests.support.fake_generator import FakeGenerator
from tests.support.serving import post, read_reply, served, wait_until

ASK = {"model": "tiny", "messages": [{"role": "user", "content": "What colour is the car?"}]}


def client(address: str, **settings) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60, **settings)


def with_images(*contents: bytes):
    parts = [{"type": "image_url", "image_url": {"url": data_uri(content)}} for content in contents]
    return {**ASK, "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "What is this?"}]}]}


def data_uri(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def get(address: str, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], str]:
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=30)
    connection.request(method, urllib.parse.quote(path), headers=headers)
    reply = connection.getresponse()
    text = reply.read().decode()
    connection.close()
    return reply.status, dict(reply.headers), text


@pytest.fixture(scope="module")
def fake():
    return FakeGenerator()


@pytest.fixture(scope="module")
def address(fake):
    with served(fake, Limits(max_body_bytes=2**20, max_pixels=20_000_000)) as address:
        yield address


@pytest.fixture(scope="module")
def api(address):
    with client(address) as api:
        yield api


def test_answer_with_and_without_thought(api):
    reply = api.chat.completions.create(**ASK)
    assert reply.choices[0].message.content == "a red car" and reply.choices[0].finish_reason == "stop"
    assert reply.model == "tiny" and reply.usage.completion_tokens == 3 and reply.usage.prompt_tokens == 23
    thinks = api.chat.completions.create(**ASK, reasoning_effort="high")
    assert thinks.choices[0].message.reasoning_content == "let me see"
    assert thinks.usage.completion_tokens_details.reasoning_tokens == 3
    assert api.chat.completions.create(**ASK, extra_body={"mode": "think"}).choices[0].phivision["mode"] == "think"


def test_images_arrive_in_order(api, fake):
    reply = api.chat.completions.create(**with_images(png(5, 4), png(1, 1)))
    assert fake.images[-2:] == [(5, 4), (1, 1)] and reply.usage.prompt_tokens_details.image_tokens == 200


def test_samples_logprobs_and_settings_reach_the_generator(api, fake):
    reply = api.chat.completions.create(**ASK, n=3, logprobs=True, top_logprobs=2, seed=9, stop=["x"], max_tokens=2)
    assert [choice.index for choice in reply.choices] == [0, 1, 2] and reply.choices[2].finish_reason == "length"
    first = reply.choices[0].logprobs.content[0]
    assert (first.token, first.logprob, [t.token for t in first.top_logprobs]) == ("<0>", -0.5, ["<0>", "<1>"])
    assert reply.usage.completion_tokens == 6
    request = fake.submitted[-1]
    assert (request.n, request.seed, request.stop, request.max_new_tokens) == (3, 9, ("x",), 2)


def test_stream(api):
    options = {"stream_options": {"include_usage": True}, "extra_body": {"mode": "think"}}
    chunks = list(api.chat.completions.create(**ASK, stream=True, logprobs=True, n=2, **options))
    for index in (0, 1):
        choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert choices[0].delta.role == "assistant"
        assert "".join(choice.delta.content or "" for choice in choices) == "a red car "
        thought = "".join(getattr(choice.delta, "reasoning_content", None) or "" for choice in choices)
        assert thought == "let me see " and [c.finish_reason for c in choices][-1] == "stop"
        assert [e.token for c in choices if c.logprobs for e in c.logprobs.content] == ["<3>", "<4>", "<5>"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 12
    assert all(chunk.usage is None for chunk in chunks[:-1]) and len({chunk.id for chunk in chunks}) == 1


def test_models(api):
    assert [model.id for model in api.models.list()] == ["tiny"]


@pytest.mark.parametrize(
    "fields, kind, words",
    [
        ({**ASK, "model": "gpt"}, openai.NotFoundError, "does not exist"),
        ({**ASK, "temperature": -1}, openai.BadRequestError, "temperature must be"),
        ({**ASK, "messages": [{"role": "user", "content": "x" * 20_000}]}, openai.BadRequestError, "20000 tokens"),
        ({**ASK, "messages": [{"role": "user", "content": "x" * 2**20}]}, openai.APIStatusError, "1,048,576 bytes"),
        (with_images(png(12_000, 9_000, 8, 2)), openai.BadRequestError, "12,000 x 9,000"),
        (with_images(png(60_000, 60_000, 1, 0)), openai.BadRequestError, "too large to decode"),
        (with_images(png(99, 99)[:-40]), openai.BadRequestError, "cannot be decoded"),
        (with_images(b"GIF8"), openai.BadRequestError, "not an image"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_error_is_the_clients_exception(api, fields, kind, words, stream):
    with pytest.raises(kind, match=words) as caught:
        api.chat.completions.create(**fields, stream=stream)
    assert caught.value.body["type"] == "invalid_request_error"


@pytest.mark.slow
def test_image_of_12000_by_9000_where_the_limit_allows_it(fake):
    with served(fake, Limits(max_pixels=110_000_000)) as address, client(address) as api:
        assert api.chat.completions.create(**with_images(png(12_000, 9_000, 8, 0))).choices[0].message.content
    assert fake.images[-1] == (12_000, 9_000)


def test_malformed_body(address):
    for body, code in ((b"{", "invalid_json"), (b"[]", "invalid_json"), (b"\xff\x00", "invalid_json")):
        status, reply = read_reply(post(address, body))
        assert (status, reply["error"]["code"]) == (400, code)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "multipart/form-data"])
def test_other_content_type_is_refused(address, kind):
    """These are what a page of another site can post without the browser asking the server first."""
    status, reply = read_reply(post(address, json.dumps(ASK).encode(), kind))
    assert status == 415 and "application/json" in reply["error"]["message"]


def test_large_body_is_refused_while_it_is_read(address):
    """The reply comes before the body has been sent."""
    status, reply = read_reply(post(address, bytes(2**20 + 1), Content_Length=str(200 * 2**20)))
    assert status == 413 and "1,048,576 bytes" in reply["error"]["message"]


@pytest.mark.slow
def test_client_that_sends_200_megabytes_receives_the_error(api):
    """The rest of the body is read and dropped, since a closed connection would take the reply with it."""
    with pytest.raises(openai.APIStatusError, match="1,048,576 bytes") as caught:
        api.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x" * 200 * 10**6}])
    assert caught.value.status_code == 413


def test_large_body_of_unknown_length_is_refused_while_it_is_read(address):
    connection = post(address, b"", Content_Length="", Transfer_Encoding="chunked")
    piece = b"10000\r\n" + bytes(2**16) + b"\r\n"
    for _ in range(17):
        connection.sendall(piece)
    status, reply = read_reply(connection)
    assert status == 413 and "1,048,576 bytes" in reply["error"]["message"]


def test_body_that_does_not_arrive(fake):
    with served(fake, Limits(client_seconds=0.2)) as address:
        status, reply = read_reply(post(address, b"{", Content_Length="100"))
    assert status == 408 and "did not arrive" in reply["error"]["message"]


@pytest.mark.parametrize(
    "host, status",
    [("localhost:1", 200), ("127.0.0.1", 200), ("[::1]:80", 200), ("evil.example", 421), ("a]b", 421), ("", 421)],
)
def test_host_of_another_site_is_refused(address, host, status):
    found, _, text = get(address, "/v1/models", Host=host)
    assert found == status and ("--hosts" in text) == (status == 421)


def test_host_can_be_allowed(fake):
    with served(fake, hosts=["pod.example"]) as address:
        assert [get(address, "/health", Host=h)[0] for h in ("POD.example:80", "other.example")] == [200, 421]
    with served(fake, hosts=["*"]) as address:
        assert get(address, "/health", Host="other.example")[0] == 200


def test_other_sites_get_no_permission_to_read(address):
    for path, method in (("/v1/models", "GET"), ("/v1/chat/completions", "OPTIONS"), ("/", "GET")):
        _, headers, _ = get(address, path, method, Origin="http://evil.example")
        assert not [name for name in headers if name.lower().startswith("access-control")]
        assert headers["content-security-policy"].startswith("default-src 'none'")
        assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "path, method, status",
    [("/nothing", "GET", 404), ("/v1/chat/completions", "GET", 405), ("/../app.py", "GET", 404), ("/", "POST", 405)],
)
def test_other_paths_and_methods(address, path, method, status):
    found, _, text = get(address, path, method)
    assert found == status and json.loads(text)["error"]["message"]


def test_page_fetches_only_its_own_files(address):
    for path, kind in (("/", "text/html"), ("/page.js", "text/javascript"), ("/page.css", "text/css")):
        get(address, path, Range="bytes=0-9")  # has no effect on others
        status, headers, text = get(address, path)
        assert status == 200 and headers["content-type"].startswith(kind) and len(text) > 1000
        assert "http://" not in text.replace("http://www.w3.org/2000/svg", "") and "https://" not in text


def test_ignored_field_is_warned_about_once(api, caplog):
    with caplog.at_level(logging.INFO, "phivision.serve"):
        for _ in range(2):
            api.chat.completions.create(**ASK, extra_body={"mystery\n": 1})
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1 and "mystery\\n" in warnings[0]


def test_log_has_one_line_per_request(api, address, caplog):
    """Reads that succeed, as of metrics every few seconds, have none."""
    with caplog.at_level(logging.INFO, "phivision.serve"):
        get(address, "/health")
        api.chat.completions.create(**with_images(png(1, 1)))
        list(api.chat.completions.create(**ASK, stream=True))
        get(address, "/nothing\x1b")
        wait_until(lambda: len(caplog.records) == 3)
    *lines, missing = [record.getMessage() for record in caplog.records]
    assert missing.startswith("GET /nothing\\x1b 404 ")
    assert all(line.startswith("POST /v1/chat/completions 200 ") for line in lines)
    assert "1 images, 1 of 1 samples, 21 + 3 tokens, queue 0.0" in lines[0] and "0 images" in lines[1]


def test_metrics(address, api):
    api.chat.completions.create(**ASK)
    text = get(address, "/metrics")[2]
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert values["phivision_engine_slots"] == "2" and "phivision_engine_kind" not in values
    assert values["phivision_samples_in_flight"] == "0" and int(values['phivision_responses_total{status="200"}']) > 0
    assert int(values['phivision_tokens_total{kind="answer"}']) >= 3
    total = int(values["phivision_request_seconds_count"])
    assert total > 0 and values['phivision_request_seconds_bucket{le="+Inf"}'] == str(total)


@pytest.fixture
def slow():
    """A generator with one slot that answers until it is cancelled."""
    return FakeGenerator(slots=1, answer="word " * 100_000, waits=0.01)


def freed(generator: FakeGenerator) -> None:
    wait_until(lambda: generator.cancelled and not generator.active)


def test_cancelled_stream_frees_its_slot(slow):
    with served(slow) as address, client(address) as api:
        with api.chat.completions.create(**ASK, stream=True) as stream:
            next(iter(stream))
            wait_until(lambda: slow.active == 1)
        freed(slow)
        assert api.chat.completions.create(**ASK, max_tokens=1).choices[0].message.content == "word"


def test_disconnecting_frees_the_slot_also_while_waiting(slow):
    with served(slow) as address:
        first, second = (post(address, json.dumps(ASK).encode()) for _ in range(2))
        wait_until(lambda: len(slow.submitted) == 2 and slow.active == 1)
        second.close()
        first.close()
        wait_until(lambda: slow.cancelled == 2 and not slow.active)
        wait_until(lambda: "phivision_samples_in_flight 0" in get(address, "/metrics")[2])


def test_disconnecting_during_preparation(monkeypatch, slow):
    """The client leaves while images are decoded, before the engine knows of the request."""
    entered, release, submit = threading.Event(), threading.Event(), slow.submit

    def late(request, on_event):
        entered.set()
        release.wait()
        return submit(request, on_event)

    monkeypatch.setattr(slow, "submit", late)
    with served(slow) as address:
        connection = post(address, json.dumps(ASK).encode())
        entered.wait()
        connection.close()
        wait_until(lambda: "phivision_samples_in_flight 0" in get(address, "/metrics")[2])
        release.set()
        freed(slow)


def test_full_queue(slow):
    with served(slow, Limits(max_queue=1)) as address, client(address) as api:
        waiting = [post(address, json.dumps(ASK).encode()) for _ in range(2)]
        wait_until(lambda: len(slow.submitted) == 2)
        with pytest.raises(openai.RateLimitError, match="queue is full") as caught:
            api.chat.completions.create(**ASK)
        assert int(caught.value.response.headers["retry-after"]) >= 1
        for connection in waiting:
            connection.close()
        freed(slow)
        assert api.chat.completions.create(**ASK, max_tokens=1).choices


def test_samples_count_for_the_queue(slow):
    with served(slow, Limits(max_queue=2)) as address, client(address) as api:
        connection = post(address, json.dumps({**ASK, "n": 3}).encode())
        wait_until(lambda: "phivision_samples_in_flight 3" in get(address, "/metrics")[2])
        with pytest.raises(openai.RateLimitError):
            api.chat.completions.create(**ASK)
        connection.close()


def test_time_limit_returns_what_there_is(slow):
    with served(slow, Limits(max_seconds=1)) as address, client(address) as api:
        reply = api.chat.completions.create(**ASK)
        assert reply.choices[0].finish_reason == "length" and reply.choices[0].message.content.startswith("word word")
        *_, last = api.chat.completions.create(**ASK, stream=True)
        assert last.choices[0].finish_reason == "length"
        freed(slow)


@pytest.mark.parametrize("stream", [False, True])
def test_time_limit_before_the_first_token(stream):
    slow = FakeGenerator(slots=1, waits=1000.0)
    with served(slow, Limits(max_seconds=0.2)) as address, client(address) as api:
        with pytest.raises(openai.APIError, match="before the first token") as caught:
            list(api.chat.completions.create(**ASK, stream=stream))
        assert caught.value.body["type"] == "server_error"
        assert stream or caught.value.status_code == 503


def test_reader_that_stops_is_disconnected_and_others_are_not():
    """Pieces of 64 KiB fill the buffers of both ends at once; then the slot must become free."""
    fast = FakeGenerator(slots=2, answer=" ".join(["x" * 2**16] * 400), waits=0.002)
    with served(fast, Limits(client_seconds=0.3)) as address, client(address) as api:
        connection = post(address, json.dumps({**ASK, "stream": True}).encode())
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        assert connection.recv(1) == b"H"  # one byte, and no more for a while
        assert api.chat.completions.create(**ASK, max_tokens=2).choices[0].finish_reason == "length"
        freed(fast)
        connection.close()


@pytest.mark.parametrize("stream", [False, True])
def test_failure_of_the_engine(stream, caplog):
    """It ends the requests that it has; health is restored by the next answer."""
    engine = FakeGenerator(fails=True)
    with served(engine) as address, client(address) as api:
        with pytest.raises(openai.APIError, match="engine") as caught:
            list(api.chat.completions.create(**ASK, stream=stream))
        assert "device" not in str(caught.value) and "the device is gone" in caplog.text
        assert get(address, "/health")[0] == 503
        engine.fails = False
        assert api.chat.completions.create(**ASK).choices
        assert get(address, "/health")[0] == 200


def test_fault_of_the_server_is_an_error_of_the_api(fake, monkeypatch, caplog):
    monkeypatch.setattr(fake, "submit", lambda *_: 1 / 0)
    with served(fake) as address, client(address) as api:
        with pytest.raises(openai.InternalServerError, match="fault of the server"):
            api.chat.completions.create(**ASK)
        assert get(address, "/health")[0] == 200 and "ZeroDivisionError" in caplog.text
