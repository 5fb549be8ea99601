"""Work of ``decode.py``: two models in the released layout, and requests."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from phivision_jax.config import DecoderConfig, ModelConfig, VisionConfig
from phivision_jax.convert.hf_config import config_json, model_config
from phivision_jax.convert.mapping import hf_shapes, model_leaves
from phivision_jax.processor import Processor

_IDS: dict[str, Any] = {"bos_token_id": 507, "eos_token_id": 508, "pad_token_id": 509}
_VISION = VisionConfig(hidden_size=64, intermediate_size=128, num_layers=3, num_heads=2)
PROPORTIONS = ModelConfig(
    vision=_VISION,
    decoder=DecoderConfig(
        vocab_size=8192,
        hidden_size=1024,
        intermediate_size=3584,
        num_layers=12,
        num_heads=8,
        num_kv_heads=2,
        max_positions=4096,
        **_IDS,
    ),
)
"""Heads of 128, four per KV head, and an MLP of 3.5 widths, as in the released model."""
SMALL = ModelConfig(
    vision=_VISION,
    decoder=dataclasses.replace(
        PROPORTIONS.decoder,
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=896,
        num_layers=4,
        num_heads=4,
        num_kv_heads=1,
    ),
)
"""For long runs of one engine against itself."""


@dataclasses.dataclass(frozen=True)
class Item:
    """A request: a question, and the length of the answer that is asked for, in tokens."""

    text: str
    answer: int


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Lengths and numbers of the work, in tokens and requests."""

    single: tuple[int, int] = (64, 128)
    """Prompt and answer at batch 1."""
    first: int = 500
    """Prompt of the time to the first token."""
    batch: int = 16
    """Rows of the peer's batches, and slots of our engine."""
    mixed: int = 48
    """Requests of mixed lengths."""
    mixed_prompts: tuple[int, int] = (16, 256)
    mixed_answers: tuple[int, int] = (10, 200)
    refilled: int = 200
    """Requests to the engine with and without refilling its slots."""
    refilled_answers: tuple[int, int] = (10, 1000)


QUICK = Sizes((16, 8), 64, 4, 8, (16, 64), (2, 16), 12, (2, 24))
"""For trying the benchmark; its numbers mean nothing."""


def write_random(directory: Path, config: ModelConfig, seed: int = 0) -> None:
    """Write a random fp32 model with the small tokenizer."""
    directory.mkdir(parents=True)
    rng = np.random.default_rng(seed)

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for name, shape in hf_shapes(model_leaves(config)).items():
            if len(shape) == 1:
                yield name, np.full(shape, name.endswith("weight"), np.float32)
            else:
                yield name, rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[-1]))

    Processor.small(config).save(directory)
    (directory / "config.json").write_text(json.dumps({**config_json(config), "dtype": "float32"}), encoding="utf-8")
    save_file(dict(tensors()), directory / "model.safetensors", {"format": "pt"})


def processor_of(directory: Path) -> Processor:
    return Processor.from_directory(directory, model_config(directory))


def prompt_ids(processor: Processor, text: str) -> list[int]:
    """Token ids of a question, with the chat template."""
    return processor.encode([{"role": "user", "content": text}], generation_prompt=True).tokens.tolist()


def question(processor: Processor, tokens: int, rng: np.random.Generator) -> str:
    """A question of random words whose prompt has at least this many tokens, and only a word more."""
    text = "Write about"
    while len(prompt_ids(processor, text)) < tokens:
        missing = tokens - len(prompt_ids(processor, text))
        words = ["".join(rng.choice(list("aeioubdklmnprst"), rng.integers(2, 8))) for _ in range(max(1, missing // 8))]
        text += " " + " ".join(words)
    return text


def items(
    processor: Processor, count: int, prompts: tuple[int, int], answers: tuple[int, int], turn: int
) -> list[Item]:
    """Requests whose lengths of prompt and answer are log-uniform in the two ranges: many short, few long.

    Each turn has other words, of about the same lengths.
    """
    lengths, words = np.random.default_rng(0), np.random.default_rng([1, turn])

    def sample(bounds: tuple[int, int]) -> list[int]:
        low, high = np.log(bounds).tolist()
        return np.exp(lengths.uniform(low, high, count)).round().astype(int).tolist()

    return [
        Item(question(processor, prompt, words), answer)
        for prompt, answer in zip(sample(prompts), sample(answers), strict=True)
    ]
