"""``generate``: answers to prompts with or without images, by an engine that is kept for the model.

A prompt's answer does not depend on the others: padding is never attended to, and a prompt may have any number of
images or none (the released code's batched generation is wrong there).
"""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from phivision_jax.images.sources import listed
from phivision_jax.inference.local import LocalGenerator
from phivision_jax.inference.requests import Event, Request
from phivision_jax.io.messages import prefix_errors, shorten
from phivision_jax.models.phivision import PhiVision
from phivision_jax.processor import Processor

MOST_SLOTS = 16
"""Most prompts that ``generate`` answers at the same time."""

_generators: weakref.WeakKeyDictionary[PhiVision, LocalGenerator] = weakref.WeakKeyDictionary()


def generate(
    model: PhiVision,
    processor: Processor,
    prompt: str | Sequence[Any] | Mapping[str, Any],
    images: Any = None,
    *,
    stream: bool = False,
    **settings: Any,
) -> Any:
    """Answer a prompt with or without images, or a batch of prompts.

        generate(model, processor, "What colour is the car?", images="photo.jpg")       # one answer
        generate(model, processor, ["What is this?", "And 2 + 2?"], images=[[photo], []])  # a list of answers
        for event in generate(model, processor, "What is this?", photo, stream=True): ...  # Delta, …, Reply

    The engine and what it has compiled are kept for the model's next call; ``inference.local.LocalGenerator`` gives
    more control, and complete replies.

    Args:
      prompt: a question or a conversation (a message or a list of them, see ``text.chat``); or a list of questions and
        conversations.
      images: one image or a list, each as ``images.sources`` takes it; for a list of prompts, a list of these. They
        replace ``<image>`` markers in order; a single question without markers gets its images in front.
      stream: return an iterator over the events of one prompt's answer as it grows (``inference.requests``).
      settings: fields of ``inference.requests.Request``: mode, max_new_tokens, thinking_budget, temperature, top_p,
        top_k, seed, stop.

    Returns:
      The answer, or one per prompt, with thoughts as ``<think>…</think>`` and without control tokens.

    Raises:
      ValueError: when images and prompts do not match, prompt and answer exceed the model's positions, or an argument
        has another form.
    """
    if not isinstance(prompt, Sequence | Mapping) or not (prompt or isinstance(prompt, str)):
        raise ValueError(f"a prompt is a question, or a list of messages or of prompts, not {shorten(prompt)}")
    single = isinstance(prompt, str | Mapping) or isinstance(prompt[0], Mapping)
    prompts = [prompt] if single else list(prompt)
    images_of = [listed(images)] if single else [listed(each) for each in listed(images)] or [[] for _ in prompts]
    if len(images_of) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts but {len(images_of)} lists of images: give one list per prompt")
    if settings.get("n", 1) != 1 or settings.get("logprobs") is not None:
        raise ValueError("n and logprobs need complete replies: call generate of inference.local.LocalGenerator")
    requests = [Request(p, i, **settings) for p, i in zip(prompts, images_of, strict=True)]
    generator = generator_of(model, processor, min(len(requests), MOST_SLOTS))
    if stream:
        if not single:
            raise ValueError(f"stream answers one prompt, not {len(prompts)}")
        return generator.stream(requests[0])
    if single:
        with prefix_errors(""):
            return generator.generate(requests)[0][0].text
    return [replies[0].text for replies in generator.generate(requests)]


def generator_of(model: PhiVision, processor: Processor, slots: int) -> LocalGenerator:
    """The generator that is kept for a model, with at least this many slots."""
    generator = _generators.get(model)
    if generator is None or generator.engine.slots < slots or generator.processor is not processor:
        generator = _generators[model] = LocalGenerator(model, processor, slots=slots)
    params, known = (jax.tree.leaves(tree) for tree in (model.split()[1], generator.engine.weights.model))
    if any(new is not old for new, old in zip(params, known, strict=True)):
        generator.update(model)
    return generator


__all__ = ["Event", "Iterator", "generate", "generator_of"]
