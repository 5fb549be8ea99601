"""Tests of the evaluator, with fixed answers in place of a model."""

import io

import numpy as np
import pytest
from PIL import Image

from phivision_jax.config import DecoderConfig, ModelConfig, VisionConfig
from phivision_jax.data.records import Record
from phivision_jax.evaluation import runner
from phivision_jax.evaluation.runner import Evaluator
from phivision_jax.evaluation.scoring import accuracy
from phivision_jax.processor import Processor
from tests.support.datasets import write_dataset

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


def test_evaluator_counts_broken_records_as_wrong(tmp_path, monkeypatch):
    """Five questions in batches of two; the third image is truncated, which its header does not show."""
    processor = Processor.small(CONFIG)
    records = [record(i, missing_bytes=60 if i == 2 else 0) for i in range(5)]
    dataset = write_dataset(tmp_path / "set", records, processor)
    yes = [processor.tokenizer.nothink_id, *processor.tokenizer.encode("yes"), processor.tokenizer.eos_id]
    shapes = set()

    def answer(model, batch, **settings):
        shapes.add(batch.tokens.shape + batch.patches.shape)
        return np.array([yes] * len(batch.tokens))

    monkeypatch.setattr(runner, "generate_ids", answer)
    answers = Evaluator(dataset, processor, rows=2, max_new_tokens=4)(None)
    assert [a.correct for a in answers] == [True, True, False, True, True]
    assert answers[2].prediction == "" and accuracy(answers) == 0.8 and len(shapes) == 1
