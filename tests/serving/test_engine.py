"""The server with the real engine on a tiny random model, in this process and as the command."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import openai
import pytest

from phivision_jax.inference.endpoint import Endpoint
from phivision_jax.inference.local import LocalGenerator
from phivision_jax.inference.requests import Request
from phivision_jax.serving.protocol import Limits
from tests.support.bombs import png
from tests.support.paths import ROOT
from tests.support.serving import post, read_reply, served, wait_until
from tests.support.small_model import small_model, write_small_model

pytestmark = pytest.mark.slow
ASK = {"model": "tiny", "messages": [{"role": "user", "content": "what color is the circle?"}]}


@pytest.fixture(scope="module")
def generator():
    model, processor = small_model()
    settings = {"slots": 2, "length": 256, "chunk": 128}
    with contextlib.closing(LocalGenerator(model, processor, **settings)) as generator:
        generator.start()
        yield generator


@pytest.fixture(scope="module")
def address(generator):
    with served(generator, Limits(client_seconds=30)) as address:
        yield address


@pytest.fixture(scope="module")
def api(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as api:
        yield api


def test_replies_over_the_api_equal_those_of_the_generator(generator, address):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (9, 12, 3), np.uint8), rng.integers(0, 256, (30, 5, 3), np.uint8)]
    sampled = {"temperature": 1.0, "top_p": 0.9, "top_k": 50, "seed": 3}
    requests = [
        Request("what is this?", images=images[:1], max_new_tokens=12),
        Request("<image>\nand <image>\nwhich is red?", images, mode="think", max_new_tokens=9, **sampled),
        Request("what color?", n=3, max_new_tokens=7, logprobs=2, mode="nothink", **sampled),
        Request("what color?", max_new_tokens=30, mode="think", thinking_budget=5, logprobs=0),
    ]
    theirs = Endpoint(f"{address}/v1", "tiny").generate(requests)
    for request, samples, ours in zip(requests, theirs, generator.generate(requests), strict=True):
        for a, b in zip(samples, ours, strict=True):
            ids = b.ids if request.logprobs is not None else ()
            texts = {"thought": b.thought.strip(), "answer": b.answer.strip()}
            assert vars(a) == vars(b) | {"timings": a.timings, "ids": ids, "logprobs": a.logprobs} | texts
            assert a.timings.prefill > 0
            for over_api, local in zip(a.logprobs, b.logprobs, strict=True):
                assert [i for i, _ in over_api.top] == [i for i, _ in local.top] and over_api.id == local.id
                assert np.isclose(over_api.logprob, local.logprob, atol=1e-5)


def test_stop_text_and_streamed_answer(api):
    answer = api.chat.completions.create(**ASK, max_tokens=20).choices[0].message.content
    stop = answer[5:7]
    stopped = api.chat.completions.create(**ASK, max_tokens=20, stop=[stop]).choices[0]
    assert stopped.finish_reason == "stop" and stopped.message.content == answer[: answer.index(stop)]
    stream = api.chat.completions.create(**ASK, max_tokens=20, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == answer


def test_what_cannot_be_answered_is_an_error(api):
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    for fields, words in (
        ({"max_tokens": 1000}, "slot"),
        ({"messages": [{"role": "user", "content": "red " * 300}]}, "slot"),
        ({"messages": [{"role": "user", "content": "a<|im_end|>"}]}, "control token"),
        ({"messages": [{"role": "user", "content": [image]}]}, "image 0"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "answer"),
    ):
        with pytest.raises(openai.BadRequestError, match=words):
            api.chat.completions.create(**ASK | fields)


@pytest.fixture
def slowed(generator, monkeypatch):
    """The same generator with 50 ms between two steps: without them, all answers end at once."""
    step = generator.scheduler.step
    monkeypatch.setattr(generator.scheduler, "step", lambda: (time.sleep(0.05), step()))
    return generator


def test_cancelled_streams_free_their_slots(api, slowed):
    """Both slots are taken by long answers; when these are closed, others are answered."""
    before = slowed.stats()["generated_tokens"]
    streams = [api.chat.completions.create(**ASK, stream=True, seed=i, temperature=1) for i in range(2)]
    for stream in streams:
        next(iter(stream))
    assert slowed.stats()["active"] == 2
    for stream in streams:
        stream.close()
    wait_until(lambda: slowed.stats()["active"] == 0)
    assert slowed.stats()["generated_tokens"] - before < 200  # of 480
    assert api.chat.completions.create(**ASK, max_tokens=2).choices[0].message.content


def test_reader_that_stops_does_not_disturb_others(api, address, slowed):
    slow = [post(address, json.dumps(ASK | {"stream": True, "n": 2}).encode()) for _ in range(2)]
    for connection in slow:
        assert connection.recv(1) == b"H"
    for i in range(4):
        assert api.chat.completions.create(**ASK, max_tokens=3, seed=i).choices[0].finish_reason == "length"
    wait_until(lambda: slowed.stats()["active"] == 0)  # long answers end without being read
    for connection in slow:
        connection.close()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_small_model(tmp_path_factory.mktemp("small") / "model")


@contextlib.contextmanager
def command(*words: str):
    """The command in a process of its own: (process, its address)."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    words = (sys.executable, "-m", "phivision_jax.cli", "serve", *words, "--port=0", "--slots=2", "--length=256")
    process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = next(line for line in process.stdout if "a page at" in line)
        yield process, re.search(r"http://\S+", line)[0].rstrip(",")
    finally:
        process.kill()
        process.communicate()


def test_command_finishes_requests_on_sigterm(checkpoint):
    with command(str(checkpoint), "--no-warm-up", "--shutdown-seconds=60") as (process, address):
        uri = "data:image/png;base64," + base64.b64encode(png(8, 8)).decode()
        content = [{"type": "image_url", "image_url": {"url": uri}}]
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 100}
        connection = post(address, json.dumps(body).encode())
        errors: list[str] = []
        reader = threading.Thread(target=lambda: errors.extend(process.stderr))
        reader.start()
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none") as api:
            assert [model.id for model in api.models.list()] == ["model"]
        process.send_signal(signal.SIGTERM)
        status, reply = read_reply(connection)
        assert status == 200 and reply["usage"]["completion_tokens"] == 100
        assert process.wait(60) == 0
        reader.join()
        assert "POST /v1/chat/completions 200" in "".join(errors) and "Traceback" not in "".join(errors)
        with pytest.raises(OSError):
            post(address, b"")


def test_command_cancels_requests_that_take_too_long_to_finish(checkpoint):
    with command(str(checkpoint), "--no-warm-up", "--shutdown-seconds=0") as (process, address):
        connection = post(address, json.dumps(ASK | {"model": "model", "stream": True}).encode())
        assert connection.recv(1) == b"H"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert "Traceback" not in process.stderr.read()


def test_port_in_use_is_a_sentence(checkpoint):
    with command(str(checkpoint), "--no-warm-up") as (_, address):
        port = address.rpartition(":")[2]
        words = [sys.executable, "-m", "phivision_jax.cli", "serve", str(checkpoint), f"--port={port}"]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "in use" in done.stderr and "Traceback" not in done.stderr
