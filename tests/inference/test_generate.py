"""``generate`` asks its generator for what its arguments say, and returns the texts of the replies."""

import dataclasses
import io

import numpy as np
import pytest

from phivision_jax.config import DecoderConfig, ModelConfig, VisionConfig
from phivision_jax.inference import generate as generation
from phivision_jax.inference.generate import generate
from phivision_jax.inference.requests import Delta
from phivision_jax.processor import Processor
from tests.support.generation import random_image, reply


class Answering:
    """A replacement of ``generator_of`` that records what is asked and gives one reply to everything."""

    def __init__(self, answer: str) -> None:
        self.reply = reply([1, 2], answer)

    def __call__(self, model, processor, slots, length):
        self.slots, self.length = slots, length
        return self

    def generate(self, requests):
        self.requests = list(requests)
        return [[self.reply] for _ in self.requests]

    def stream(self, request):
        self.requests = [request]
        yield Delta(0, "answer", self.reply.answer)
        yield self.reply

    @property
    def prompts(self):
        """Tokens and patches of every prompt."""
        return [
            (r.messages.tokens.tolist(), [image.patches.tolist() for image in r.messages.images]) for r in self.requests
        ]


@pytest.fixture
def asked(monkeypatch):
    config = ModelConfig(
        vision=VisionConfig(patch_size=2),
        decoder=DecoderConfig(vocab_size=512, bos_token_id=507, eos_token_id=508, pad_token_id=509, max_positions=512),
        min_patches=4,
        max_patches=4,
    )
    answer = Answering("a circle")
    monkeypatch.setattr(generation, "generator_of", answer)
    return Processor.small(config), answer


def test_generate_one_prompt_or_list(asked):
    processor, answer = asked
    photo = random_image((4, 4), 0)
    assert generate(None, processor, "what shape is this?", images=[photo]) == "a circle"
    ((tokens, patches),) = answer.prompts
    assert len(patches) == 1 and len(patches[0]) == 4 and answer.slots == 1
    text = processor.tokenizer.decode([t for t in tokens if t >= 0])
    assert "what shape is this?" in text and text.endswith("assistant")
    assert generate(None, processor, ["one", "two"], images=[[photo], []]) == ["a circle"] * 2
    assert [len(patches) for _, patches in answer.prompts] == [1, 0] and answer.slots == 2
    conversation = [{"role": "user", "content": "one"}]
    assert generate(None, processor, conversation) == "a circle"
    assert generate(None, processor, [conversation, "two"]) == ["a circle"] * 2


def test_generate_keeps_slots_within_a_limit(asked):
    processor, answer = asked
    assert generate(None, processor, ["what?"] * 40) == ["a circle"] * 40
    assert len(answer.requests) == 40 and answer.slots == 16


def test_generate_passes_settings_on(asked):
    processor, answer = asked
    settings = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "seed": 3, "thinking_budget": 5, "max_new_tokens": 9}
    generate(None, processor, ["one", "two"], stop="circle", mode="think", **settings)
    for request in answer.requests:
        assert {name: getattr(request, name) for name in settings} == settings
        assert request.stop == ("circle",) and request.mode == "think"
    longest = max(len(tokens) for tokens, _ in answer.prompts)
    assert answer.length == longest + 9


def test_generate_shows_thoughts(asked):
    processor, answer = asked
    answer.reply = reply([1, 2], "red", "it is", "think")
    assert generate(None, processor, "what?") == "<think>it is</think>red"


def test_generate_streams(asked):
    processor, answer = asked
    events = generate(None, processor, "what?", stream=True, max_new_tokens=5)
    assert list(events) == [Delta(0, "answer", "a circle"), answer.reply]
    assert answer.requests[0].max_new_tokens == 5
    with pytest.raises(ValueError, match="stream answers one prompt, not 2"):
        generate(None, processor, ["one", "two"], stream=True)


@pytest.mark.parametrize("settings", [{"n": 2}, {"logprobs": 0}, {"logprobs": 3}])
def test_generate_rejects_what_needs_complete_replies(asked, settings):
    with pytest.raises(ValueError, match="n and logprobs need complete replies"):
        generate(None, asked[0], "what?", **settings)


@pytest.mark.parametrize(("mode", "token"), [("think", "think_id"), ("nothink", "nothink_id")])
def test_generate_mode_begins_answer(asked, mode, token):
    processor, answer = asked
    generate(None, processor, "what?", mode=mode)
    ((tokens, _),) = answer.prompts
    assert tokens[-1] == getattr(processor.tokenizer, token)


def test_generate_takes_every_form_of_images(asked, tmp_path):
    processor, answer = asked
    photo, file = random_image((4, 4), 0), io.BytesIO()
    photo.save(file, "PNG")
    (tmp_path / "photo.png").write_bytes(file.getvalue())

    def prompts(prompt, images):
        generate(None, processor, prompt, images)
        return answer.prompts

    want = prompts("what?", [photo])
    assert len(want[0][1]) == 1
    path = str(tmp_path / "photo.png")
    for images in (
        photo,
        path,
        tmp_path / "photo.png",
        file,
        file.getvalue(),
        np.asarray(photo),
        (path,),
        {"url": path},
    ):
        assert prompts("what?", images) == want
    assert prompts({"role": "user", "content": "what?"}, path) == want
    assert prompts([{"role": "user", "content": "what?"}], path) == want
    assert prompts({"role": "user", "content": "<image>\nwhat?"}, path) == want
    for part in ({"type": "image", "url": path}, {"type": "input_image", "image_url": f"file://{path}"}):
        assert prompts({"role": "user", "content": [part, {"type": "text", "text": "what?"}]}, None) == want
    assert prompts(["what?", "else?"], [path, None]) == prompts(["what?", "else?"], [[photo], []])


def test_generate_default_leaves_thoughts_room(asked):
    """4,096 new tokens, here those that a prompt leaves of 512 positions."""
    processor, answer = asked
    generate(None, processor, "what?")
    ((tokens, _),) = answer.prompts
    assert answer.requests[0].max_new_tokens == 512 - len(tokens)
    processor.config = dataclasses.replace(
        processor.config, decoder=dataclasses.replace(processor.config.decoder, max_positions=32_768)
    )
    generate(None, processor, "what?")
    assert answer.requests[0].max_new_tokens == 4096


@pytest.mark.parametrize(
    ("prompt", "images", "message"),
    [
        (None, None, "a prompt is a question, or a list of messages or of prompts, not None"),
        ([], None, "not \\[\\]"),
        (5, None, "not 5"),
        ([5], None, "message 0 is not a dict with role and content"),
        ({"content": "what?"}, None, "message 0 is not a dict with role and content"),
        ("what?", 5, "image 0 is given as int: give a path, bytes, a PIL image or a uint8 array"),
        ("what?", np.zeros((3, 8, 8), np.float32), r"image 0 is an array \(3, 8, 8\) of float32"),
        (["a", "b"], "photo.jpg", "2 prompts but 1 lists of images"),
    ],
)
def test_generate_rejects_other_forms(asked, prompt, images, message):
    with pytest.raises(ValueError, match=message):
        generate(None, asked[0], prompt, images)


def test_generate_rejects_what_does_not_fit(asked):
    processor, _ = asked
    with pytest.raises(ValueError, match="2 prompts but 1 lists of images"):
        generate(None, processor, ["a", "b"], images=[[]])
    with pytest.raises(ValueError, match="512 positions"):
        generate(None, processor, "a", max_new_tokens=510)
