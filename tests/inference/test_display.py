"""Answers in a notebook: still text, and a page with images, boxes and the folded thought."""

import base64
import copy
import dataclasses
import html.parser
import io
import pickle

import numpy as np
import pytest
from PIL import Image, ImageColor

from phivision_jax.config import DecoderConfig, ModelConfig, VisionConfig
from phivision_jax.inference import generate as generation
from phivision_jax.inference.display import Answer
from phivision_jax.inference.grounding import COLOURS
from phivision_jax.inference.requests import Reply, Timings
from phivision_jax.processor import Processor

SMALL = ModelConfig(
    vision=VisionConfig(patch_size=2),
    decoder=DecoderConfig(vocab_size=512, bos_token_id=507, eos_token_id=508, pad_token_id=509, max_positions=512),
    min_patches=4,
    max_patches=4,
)
REPLY = Reply("It is red.", "a cup [0.5, 0.5, 1.0, 1.0]", "think", "stop", tuple(range(11)), 1200, 36, 5, 6,
              Timings(0.1, 0.4, 2.0))  # fmt: skip


class Page(html.parser.HTMLParser):
    """Tags in order, text, and the decoded images of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.images, self.open = [], "", [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "img":
            data = base64.b64decode(dict(attrs)["src"].removeprefix("data:image/jpeg;base64,"))
            self.images.append(Image.open(io.BytesIO(data)))
        else:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_answer_is_the_text_of_the_reply():
    answer = Answer(REPLY, ["photo.jpg"])
    assert answer == "<think>It is red.</think>a cup [0.5, 0.5, 1.0, 1.0]" and isinstance(answer, str)
    assert answer.upper().endswith("1.0]") and answer.reply is REPLY and answer.images == ("photo.jpg",)
    for again in (copy.deepcopy(answer), pickle.loads(pickle.dumps(answer))):
        assert again == answer and again.reply == REPLY and again.images == answer.images


def test_page_shows_thought_answer_and_numbers():
    page = Page(Answer(REPLY)._repr_html_())
    assert "img" not in page.tags and page.tags.count("details") == 1
    lines = [line for line in page.text.splitlines() if line]
    assert lines == ["Thought, 5 tokens", "It is red.", "a cup [0.5, 0.5, 1.0, 1.0]",
                     "1,200 + 11 tokens · 2.5 s · 5.0 tokens/s · think"]  # fmt: skip
    limited = dataclasses.replace(REPLY, thought_closed=False, answer="", finish_reason="length")
    assert "5 tokens, not closed" in Answer(limited)._repr_html_() and "think · length" in Answer(limited)._repr_html_()
    plain = dataclasses.replace(REPLY, thought="", mode=None, ids=(1,), timings=Timings(0, 0.1, 0))
    page = Page(Answer(plain)._repr_html_())
    assert "details" not in page.tags and page.text.strip().endswith("1,200 + 1 tokens · 0.1 s · no mode")


def test_page_has_boxes_on_the_last_image():
    white = Image.new("RGB", (100, 80), "white")
    (only,) = Page(Answer(REPLY, [white])._repr_html_()).images
    assert only.size == (600, 480)
    close = np.abs(np.asarray(only).astype(int) - ImageColor.getrgb(COLOURS[0])).max(-1) < 40
    rows, columns = (np.flatnonzero(close.any(axis)) for axis in (1, 0))
    assert abs(columns.min() - 300) <= 2 and columns.max() >= 597 and rows.max() >= 477 and 200 < rows.min() <= 240
    first, second = Page(Answer(REPLY, [white, np.full((80, 100, 3), 255, np.uint8)])._repr_html_()).images
    assert first.size == second.size == (300, 240)
    assert (np.asarray(first) == 255).all() and not (np.asarray(second) == 255).all()


def test_page_of_a_large_photo_is_small():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (1500, 2000, 3), np.uint8))
    text = Answer(REPLY, [noise])._repr_html_()
    assert Page(text).images[0].size == (640, 480) and len(text) < 500_000


def test_page_leaves_out_images_that_are_gone(tmp_path):
    assert Page(Answer(REPLY, [tmp_path / "gone.png", b"no image"])._repr_html_()).images == []


@pytest.mark.parametrize("field", ["thought", "answer"])
def test_page_escapes_text(field):
    hostile = "</div></details><script>alert(1)</script><img src=x onerror=alert(1)>\"'&amp;"
    reply = dataclasses.replace(REPLY, **{field: hostile})
    page = Page(Answer(reply)._repr_html_())
    assert hostile in page.text and set(page.tags) == {"div", "details", "summary"}


def test_generate_returns_answers_with_their_images(monkeypatch):
    class Replying:
        def generate(self, requests):
            return [[dataclasses.replace(REPLY, answer=f"answer {i}")] for i, _ in enumerate(requests)]

    processor = Processor.small(SMALL)
    monkeypatch.setattr(generation, "generator_of", lambda *args: Replying())
    a, b, c = (Image.new("RGB", (4, 4), colour) for colour in ("red", "green", "blue"))
    inline = {"role": "user", "content": [{"type": "text", "text": "<image> or "}, {"type": "image", "image": b}]}
    answer = generation.generate(None, processor, [inline], images=a)
    assert answer == "<think>It is red.</think>answer 0" and answer.images == (a, b)
    answers = generation.generate(None, processor, ["one?", "two?"], images=[[c], []])
    assert [each.reply.answer for each in answers] == ["answer 0", "answer 1"]
    assert [each.images for each in answers] == [(c,), ()]
