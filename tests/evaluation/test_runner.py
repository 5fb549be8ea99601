"""Tests of the evaluator, with fixed answers in place of a model."""

import io
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from phivision_jax.config import DecoderConfig, ModelConfig, VisionConfig
from phivision_jax.data.records import Record
from phivision_jax.evaluation import runner
from phivision_jax.evaluation.accuracy import accuracy
from phivision_jax.evaluation.runner import Evaluator
from phivision_jax.processor import Processor
from tests.support.datasets import write_dataset
from tests.support.generation import reply

CONFIG = ModelConfig(
    vision=VisionConfig(patch_size=8),
    decoder=DecoderConfig(vocab_size=512, bos_token_id=507, eos_token_id=508, pad_token_id=509),
    min_patches=4,
    max_patches=4,
)


def turns(*contents: str) -> tuple[dict[str, str], ...]:
    """Messages of user and assistant, which has the last one."""
    roles = ["user", "assistant"] * len(contents)
    return tuple({"role": r, "content": c} for r, c in zip(roles[-len(contents) :], contents, strict=True))


def test_records_without_a_question_or_an_answer_are_named_and_left_out(tmp_path, caplog):
    processor = Processor.small(CONFIG)
    system = {"role": "system", "content": "be brief"}
    cases = {
        "caption": turns("a caption"),
        "only a system message": (system, *turns("a caption")),
        "asked": turns("is it?", "yes"),
        "asked second": (system, *turns("is it?", "yes", "and this?", "no")),
        "no question": turns(" ", "yes"),
    }
    records = [Record(name, "made", (), messages, mode="nothink") for name, messages in cases.items()]
    dataset = write_dataset(tmp_path / "set", records, processor)
    with caplog.at_level("WARNING"):
        evaluator = Evaluator(dataset, processor, rows=2, max_new_tokens=4)
    assert [dataset[int(i)].id for i in evaluator.records] == ["asked", "asked second"]
    (message,) = caplog.messages
    assert "3 of 5 records have no question with an answer to score" in message
    assert "caption, only a system message, no question" in message
    dataset = write_dataset(tmp_path / "captions", records[:2], processor)
    with pytest.raises(ValueError, match=r"captions: 2 of 2 records have no question .*; give data with questions"):
        Evaluator(dataset, processor, rows=2, max_new_tokens=4)


def record(i: int, missing_bytes: int = 0) -> Record:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)).save(file, "PNG")
    image = file.getvalue()
    messages = ({"role": "user", "content": "<image>\nred?"}, {"role": "assistant", "content": "yes"})
    image = image[: len(image) - missing_bytes]
    return Record(id=str(i), source="made", images=(image,), messages=messages, mode="nothink")


class Yes:
    """A replacement of ``LocalGenerator`` that answers "yes" and records how it is used."""

    instances: ClassVar[list["Yes"]] = []

    def __init__(self, model, processor, *, slots, length):
        self.models, self.slots, self.length, self.requests = [model], slots, length, []
        self.instances.append(self)

    def update(self, model):
        self.models.append(model)

    def generate(self, requests, advance):
        replies = []
        for request in requests:
            self.requests.append(request)
            replies.append([reply([1], "yes")])
            advance(1)
        return replies


def test_evaluator_counts_broken_records_as_wrong(tmp_path, monkeypatch):
    """Five questions; the third image is truncated, which its header does not show."""
    monkeypatch.setattr(runner, "LocalGenerator", Yes)
    monkeypatch.setattr(Yes, "instances", [])
    processor = Processor.small(CONFIG)
    records = [record(i, missing_bytes=60 if i == 2 else 0) for i in range(5)]
    dataset = write_dataset(tmp_path / "set", records, processor)
    evaluator = Evaluator(dataset, processor, rows=2, max_new_tokens=4, mode="think")
    steps: list[int] = []
    answers = evaluator("first", steps.append)
    assert steps == [1] * 5
    assert [a.correct for a in answers] == [True, True, False, True, True]
    assert answers[2].prediction == "" and accuracy(answers) == 0.8
    assert evaluator("second") == answers
    (generator,) = Yes.instances
    assert generator.models == ["first", "second"] and generator.slots == 2 and len(generator.requests) == 8
    for request in generator.requests:
        tokens = request.messages.tokens
        assert tokens[-1] == processor.tokenizer.think_id and len(request.messages.images) == 1
        assert request.mode == "think" and request.max_new_tokens == 4 and len(tokens) + 4 <= generator.length
