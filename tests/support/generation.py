"""Generators of small models, what they answer to ids and images, and the same by forward passes."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

from phivision_jax.config import ModelConfig
from phivision_jax.images.layout import PatchedImage, make_layout
from phivision_jax.inference.local import LocalGenerator
from phivision_jax.inference.requests import Reply, Request, Timings
from phivision_jax.models.phivision import PhiVision
from phivision_jax.processor import Processor
from phivision_jax.rows import batch_from_ids, expand
from tests.support.forward import logits

LENGTH, CHUNK, PATCHES = 512, 128, 256
"""Sizes that tests share, so that few programs are compiled."""


_compiled: dict[tuple, dict] = {}


def generator_of(model: PhiVision, processor: Processor | None = None, **settings) -> LocalGenerator:
    """A generator with small slots, and without stop tokens unless they are given.

    Generators whose programs are the same share what is compiled.
    """
    settings = {"slots": 4, "length": LENGTH, "chunk": CHUNK, "stop_ids": ()} | settings
    generator = LocalGenerator(model, processor or Processor(None, None, model.config), **settings)
    engine = generator.engine
    if engine.mesh is None:
        # The mask in images is an array of the programs, not a part of them.
        config = dataclasses.replace(model.config, image_attention="causal")
        program = dataclasses.replace(engine.program, graphdef=None, layer=None)
        key = (config, program, str(engine.dtype), engine.slots, engine.entries, engine.pool, engine.ends)
        engine._compiled = _compiled.setdefault(key, engine._compiled)
    return generator


def random_image(size: tuple[int, int], seed: int) -> Image.Image:
    """Noise of a width and a height."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


def encoded(config: ModelConfig, images: Iterable[Image.Image]) -> list[PatchedImage]:
    layout = make_layout(config)
    return [layout.encode(image) for image in images]


def request_of(ids: Sequence[int], images: Sequence[PatchedImage] = (), **settings) -> Request:
    """A request for the continuation of ids, with −200 for each image."""
    return Request(expand(list(ids), list(images)), **settings)


def ids_of(generator: LocalGenerator, requests: Iterable[Request]) -> list[list[int]]:
    """The ids of all replies to requests that are asked together."""
    return [list(reply.ids) for reply in itertools.chain(*generator.generate(requests))]


def logits_after(
    model: PhiVision, ids: Sequence[int], images: Sequence[PatchedImage], answer: Sequence[int]
) -> np.ndarray:
    """The logits [len(answer), V] that decide each token of an answer, by one forward pass over prompt and answer."""
    batch = batch_from_ids([[*ids, *answer]], [list(images)], config=model.config, length=LENGTH, num_patches=PATCHES)
    used = int((batch.segment_ids[0] > 0).sum())
    return np.asarray(logits(*model.split(), batch)[0, used - len(answer) - 1 : used - 1])


def by_forwards(model: PhiVision, ids: Sequence[int], images: Sequence[PatchedImage], steps: int) -> list[int]:
    """Greedy continuation by a forward pass over the complete sequence for each token."""
    answer: list[int] = []
    for _ in range(steps):
        answer.append(int(logits_after(model, ids, images, [*answer, 0])[-1].argmax()))
    return answer


def reply(ids: Sequence[int], answer: str, thought: str = "", mode="nothink", **fields) -> Reply:
    """A reply without a model."""
    counts = {"prompt_tokens": 0, "image_tokens": 0, "thought_tokens": 0, "answer_tokens": len(ids)}
    return Reply(thought, answer, mode, "stop", tuple(ids), timings=Timings(0.0, 0.0, 0.0), **(counts | fields))
