"""OpenAI's JSON to requests and back, with expected values written by hand."""

from __future__ import annotations

import base64
import dataclasses
import json

import pytest

from phivision_jax.inference.requests import Delta, Reply, Request, Timings, TokenLogprob
from phivision_jax.processor import Processor
from phivision_jax.serving.protocol import ApiError, Chat, Limits, read_chat
from tests.support.batches import TINY
from tests.support.bombs import png

USER = {"role": "user", "content": "Hello"}


def data_uri(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def read(messages=(USER,), limits=Limits(), ignored=lambda _: None, **fields):  # noqa: B008
    return read_chat(json.dumps({"messages": messages, **fields}).encode(), "tiny", limits, str, ignored)


def test_fields_become_settings():
    chat = read(
        model="tiny",
        temperature=1,
        top_p=0.5,
        top_k=4,
        seed=7,
        stop="x",
        n=3,
        max_tokens=5,
        max_completion_tokens=6,
        stream=True,
        stream_options={"include_usage": True},
    )
    request = chat.request
    assert (request.temperature, request.top_p, request.top_k, request.seed) == (1.0, 0.5, 4, 7)
    assert (request.stop, request.n, request.max_new_tokens, request.mode) == (("x",), 3, 6, "auto")
    assert request.logprobs is None and chat.stream and chat.include_usage
    assert read(max_tokens=5).request.max_new_tokens == 5


def test_null_is_as_if_left_out():
    names = ("temperature", "stop", "n", "logprobs", "top_logprobs", "stream", "stream_options", "reasoning_effort")
    ignored: list[str] = []
    found = read(ignored=ignored.append, **dict.fromkeys((*names, "tools")))
    assert (found.request.temperature, found.request.n, found.stream, ignored) == (0.0, 1, False, [])


def test_absent_seed_differs_each_time():
    assert read().request.seed != read().request.seed


@pytest.mark.parametrize(
    "fields, mode, budget",
    [
        ({}, "auto", None),
        ({"reasoning_effort": "none"}, "nothink", None),
        ({"reasoning_effort": "minimal"}, "nothink", None),
        ({"reasoning_effort": "low"}, "think", 512),
        ({"reasoning_effort": "medium"}, "think", 2048),
        ({"reasoning_effort": "high"}, "think", None),
        ({"mode": "think", "thinking_budget": 9}, "think", 9),
        ({"mode": "auto", "reasoning_effort": "high"}, "auto", None),
        ({"reasoning_effort": "low", "thinking_budget": 3}, "think", 3),
    ],
)
def test_mode_of_effort(fields, mode, budget):
    request = read(**fields).request
    assert (request.mode, request.thinking_budget) == (mode, budget)


@pytest.mark.parametrize(
    "fields, expected",
    [({"logprobs": True}, 0), ({"logprobs": True, "top_logprobs": 3}, 3), ({"top_logprobs": 0}, None)],
)
def test_logprobs(fields, expected):
    assert read(**fields).request.logprobs == expected


def test_messages_keep_texts_images_and_thoughts():
    image = png(2, 3)
    parts = [{"type": "image_url", "image_url": {"url": data_uri(image)}}, {"type": "text", "text": "What?"}]
    answered = {"role": "assistant", "content": "so", "reasoning_content": "hm"}
    found = read([{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}, answered, USER])
    messages, images = found.request.conversation()
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
    assert messages[1]["content"] == "<image>\nWhat?" and messages[2]["content"] == "<think>hm</think>so"
    assert images == [image]


@pytest.fixture(scope="module")
def small_processor():
    decoder = dataclasses.replace(TINY.decoder, vocab_size=512, eos_token_id=508)
    return Processor.small(dataclasses.replace(TINY, decoder=decoder))


@pytest.mark.parametrize("text", ["an <image> here", r"<\image> <\\image>", "<IMG> <box1> <video>", "<imagery>"])
def test_marker_in_a_text_stays_text(text, small_processor):
    request = read([{"role": "user", "content": text}]).request
    ids = small_processor.encode(*request.conversation(), generation_prompt=True).tokens
    assert text in small_processor.tokenizer.decode(list(ids))


def test_other_fields_are_named_once_each():
    ignored: list[str] = []
    read(ignored=ignored.append, tools=[], logit_bias={}, user="me", presence_penalty=None)
    assert sorted(ignored) == ["logit_bias", "tools"]


@pytest.mark.parametrize("key", ["image_url", "image", "path", "url", "bytes"])
@pytest.mark.parametrize(
    "place", ["https://x.org/a.png", "http://127.0.0.1/a.png", "file:///etc/passwd", "/etc/passwd", "a.jpg", "", 3, []]
)
def test_only_data_uris_are_images(key, place):
    for given in (place, {"url": place}, {"path": place}):
        with pytest.raises(ValueError, match="image 0 must be a data: URI"):
            read([{"role": "user", "content": [{"type": "image", key: given}]}])


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "empty"),
        (b"no image", "not an image"),
        (b"%PDF-1.7", "PDF"),
        (png(3001, 1001), "3,001 x 1,001"),
        (png(60_000, 60_000, 1, 0), "too large"),
    ],
)
def test_bad_image_is_refused_by_its_header(content, words):
    part = {"type": "image_url", "image_url": data_uri(content)}
    with pytest.raises(ValueError, match=words):
        read([{"role": "user", "content": [part]}], Limits(max_pixels=3_000_000))


def test_smallest_image_and_number_of_images():
    part = {"type": "image_url", "image_url": {"url": data_uri(png(1, 1)), "detail": "high"}}
    messages = [{"role": "user", "content": [part, part]}]
    assert len(read(messages, Limits(max_images=2)).request.images) == 2
    with pytest.raises(ValueError, match="at most 1 images"):
        read(messages, Limits(max_images=1))


@pytest.mark.parametrize(
    "fields, start",
    [
        ({"temperature": "hot"}, "temperature must"),
        ({"temperature": float("nan")}, "temperature must"),
        ({"max_completion_tokens": 0}, "max_completion_tokens must"),
        ({"max_tokens": 1.5}, "max_tokens must"),
        ({"n": 0}, "n must"),
        ({"n": True}, "n must"),
        ({"n": 1000}, "n must"),
        ({"stop": [1]}, "stop must"),
        ({"stop": 3}, "stop must"),
        ({"mode": "fast"}, "mode must"),
        ({"mode": ["think"]}, "mode must"),
        ({"reasoning_effort": "huge"}, "reasoning_effort must"),
        ({"reasoning_effort": []}, "reasoning_effort must"),
        ({"top_logprobs": 2}, "top_logprobs must"),
        ({"logprobs": True, "top_logprobs": 99}, "top_logprobs must"),
        ({"logprobs": 5}, "logprobs must"),
        ({"stream": "yes"}, "stream must"),
        ({"stream_options": []}, "stream_options must"),
        ({"messages": []}, "a conversation is a non-empty list"),
        ({"messages": "Hello"}, "messages must"),
        ({"messages": True}, "messages must"),
        ({"messages": [None]}, "messages[0] must"),
        ({"messages": [USER, {"role": "tool", "content": ""}]}, "message 1 has role"),
        ({"messages": [{"role": [], "content": ""}]}, "message 0 has role"),
        ({"messages": [{"role": "user"}]}, "message 0 is not a dict with role and content"),
        ({"messages": [{"role": "user", "content": 3}]}, "message 0: its content"),
        ({"messages": [{"role": "user", "content": {}}]}, "message 0: its content"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "message 0: a part"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]}, "message 0: a part"),
    ],
)
def test_mistake_is_named(fields, start):
    with pytest.raises(ValueError) as caught:
        read(**fields)
    assert str(caught.value).startswith(start)


@pytest.mark.parametrize(
    "message, param",
    [("temperature must be", "temperature"), ("image 0 must be", None), ("the prompt is too long", None)],
)
def test_error_names_the_field(message, param):
    error = ApiError(400, message + "\x1b").body["error"]
    assert error == {"message": message + "\\x1b", "type": "invalid_request_error", "param": param, "code": None}
    assert ApiError(500, "").body["error"]["type"] == "server_error"
    assert ApiError(429, "").headers == {"Retry-After": "2"} and ApiError(400, "").headers == {}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"n": ' + b"9" * 5000 + b"}"])
def test_body_that_is_no_json(content):
    with pytest.raises(ApiError) as caught:
        read_chat(content, "tiny", Limits(), str, print)
    assert (caught.value.status, caught.value.body["error"]["code"]) == (400, "invalid_json")


def test_unknown_model():
    with pytest.raises(ApiError) as caught:
        read(model="gpt\x1b")
    error = caught.value.body["error"]
    assert (caught.value.status, error["code"]) == (404, "model_not_found")
    assert "\\x1b" in error["message"] and "tiny" in error["message"]


REPLY = Reply(
    thought="I see",
    answer="red",
    mode="think",
    finish_reason="length",
    ids=(5, 6, 7),
    prompt_tokens=10,
    image_tokens=4,
    thought_tokens=2,
    answer_tokens=1,
    timings=Timings(1.0, 2.0, 3.0),
    logprobs=(TokenLogprob(5, -1.0), TokenLogprob(6, -2.0), TokenLogprob(7, -float("inf"), ((7, -0.25),))),
)


def test_reply_as_a_completion():
    answer = Chat(Request(""), False, False, "tiny", {5: "I", 6: " see", 7: "\ufffd"}.__getitem__, [REPLY]).completion()
    assert answer["object"] == "chat.completion" and answer["model"] == "tiny" and answer["id"].startswith("chatcmpl-")
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "red", "reasoning_content": "I see"}
    assert (choice["index"], choice["finish_reason"]) == (0, "length")
    part_of_a_character = {"token": "\ufffd", "bytes": None, "id": 7}
    assert choice["logprobs"]["content"] == [
        {**part_of_a_character, "logprob": -9999.0, "top_logprobs": [{**part_of_a_character, "logprob": -0.25}]}
    ]
    assert choice["logprobs"]["reasoning_content"][1] == {
        "token": " see", "bytes": [32, 115, 101, 101], "logprob": -2.0, "id": 6, "top_logprobs": []
    }  # fmt: skip
    assert choice["phivision"] == {
        "mode": "think", "thought_tokens": 2, "answer_tokens": 1, "thought_closed": True,
        "queue_s": 1.0, "prefill_s": 2.0, "decode_s": 3.0,
    }  # fmt: skip
    assert answer["usage"] == {
        "prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13,
        "prompt_tokens_details": {"image_tokens": 4}, "completion_tokens_details": {"reasoning_tokens": 2},
    }  # fmt: skip


def test_events_as_chunks():
    chat = Chat(Request("", n=2), True, True, "tiny", str, [REPLY, REPLY])
    thought, text = chat.piece(Delta(1, "thought", "hm")), chat.piece(Delta(0, "answer", "r"))
    again = chat.piece(Delta(0, "answer", "ed"))
    assert thought["choices"][0]["delta"] == {"role": "assistant", "reasoning_content": "hm"}
    assert thought["choices"][0]["index"] == 1
    assert text["choices"][0]["delta"] == {"role": "assistant", "content": "r"}
    assert again["choices"][0]["delta"] == {"content": "ed"} and again["choices"][0]["finish_reason"] is None
    end = chat.piece(REPLY)["choices"][0]
    assert end["delta"] == {} and end["finish_reason"] == "length" and end["phivision"]["mode"] == "think"
    last = chat.end()
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 6 and last["usage"]["prompt_tokens"] == 10
    assert text["usage"] is None and len({piece["id"] for piece in (text, again, last)}) == 1
    assert text["object"] == "chat.completion.chunk"
    assert "usage" not in Chat(Request(""), True, False, "tiny", str).piece(REPLY)


def test_log_line_by_hand():
    chat = Chat(Request("", images=[b"", b""], n=3), True, True, "tiny", str, [REPLY])
    assert str(chat) == "2 images, 1 of 3 samples, 10 + 3 tokens, queue 1.000 s, prefill 2.000 s, decode 3.000 s"
