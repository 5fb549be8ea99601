"""Imported datasets as a benchmark."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from phivision_jax.config import DecoderConfig, ModelConfig, VisionConfig
from phivision_jax.data.records import Record
from phivision_jax.evaluation.dataset import DatasetBenchmark
from phivision_jax.evaluation.run import Runner
from phivision_jax.evaluation.slots import LongestRequest
from phivision_jax.evaluation.summary import failures, summarize
from phivision_jax.evaluation.task import Sampling, survey
from phivision_jax.processor import Processor
from tests.support.answers import Answers
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
    directory = write_dataset(tmp_path / "set", records, processor).directory
    with caplog.at_level("WARNING"):
        items = DatasetBenchmark().items(str(directory))
    assert [item.id for item in items] == ["asked", "asked second"]
    (message,) = caplog.messages
    assert "3 of 5 records have no question with an answer to score" in message
    assert "caption, only a system message, no question" in message
    request = DatasetBenchmark().request(items[1])
    assert [message["content"] for message in request.messages] == ["be brief", "is it?", "yes", "and this?"]
    directory = write_dataset(tmp_path / "captions", records[:2], processor).directory
    with pytest.raises(ValueError, match=r"captions: 2 of 2 records have no question .*; give data with questions"):
        DatasetBenchmark().items(str(directory))


def record(i: int, missing_bytes: int = 0) -> Record:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)).save(file, "PNG")
    image = file.getvalue()
    messages = ({"role": "user", "content": "<image>\nred?"}, {"role": "assistant", "content": "yes"})
    image = image[: len(image) - missing_bytes]
    return Record(id="same", source="made", images=(image,), messages=messages, mode="nothink", task="ocr")


def test_broken_records_count_as_wrong(tmp_path):
    """Five questions; the third image is truncated, which its header does not show."""
    processor, benchmark = Processor.small(CONFIG), DatasetBenchmark()
    records = [record(i, missing_bytes=60 if i == 2 else 0) for i in range(5)]
    items = benchmark.items(str(write_dataset(tmp_path / "set", records, processor).directory))
    longest, sampling = LongestRequest(processor), Sampling(max_new_tokens=4)
    task = survey(benchmark, items, sampling, measure=longest)
    results, generator = [], Answers(lambda question, mode: "Yes.")
    runner = Runner(generator, lambda result, item: results.append(result), sampling=sampling, patch=processor.patch)
    runner.run([task])
    by_item = {result.item: result for result in results}
    assert [by_item[item.id].value for item in items] == [1, 1, 0, 1, 1]
    (summary,) = summarize(results, {"dataset": benchmark})
    assert summary.figures == {"score": 80.0, "nothink/ocr": 80.0} and summary.failed == 1
    (line,) = failures(results)
    assert line.startswith("dataset: 1 of 5 failed, as same#2 (auto): image")
    for request in generator.asked:
        prompt = processor.encode(request.messages, request.images, mode="think", generation_prompt=True)
        assert len(prompt.tokens) + 4 == longest.tokens and request.max_new_tokens == 4
