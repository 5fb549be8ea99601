"""``generate``: answers to prompts with or without images, by an engine that is kept for the model.

A prompt's answer does not depend on the others: padding is never attended to, and a prompt may have any number of
images or none (the released code's batched generation is wrong there).
"""

import contextlib
import dataclasses
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from phivision_jax.images.sources import listed
from phivision_jax.inference.display import Answer
from phivision_jax.inference.local import LocalGenerator
from phivision_jax.inference.requests import MAX_NEW_TOKENS, Request
from phivision_jax.io.messages import prefix_errors, shorten
from phivision_jax.models.phivision import PhiVision
from phivision_jax.processor import Processor
from phivision_jax.text.chat import flatten

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
      The answer, or one per prompt, with thoughts as ``<think>…</think>`` and without control tokens: a ``str`` that a
      notebook displays with its images and boxes, and whose ``reply`` has all numbers (``inference.display.Answer``).

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
    if stream and not single:
        raise ValueError(f"stream answers one prompt, not {len(prompts)}")
    requests = [Request(p, i, **settings) for p, i in zip(prompts, images_of, strict=True)]
    examples, shown = [], []
    for i, request in enumerate(requests):
        with contextlib.nullcontext() if single else prefix_errors(f"prompt {i}"):
            messages, given = request.conversation()
            examples.append(processor.encode(messages, given, mode=request.mode, generation_prompt=True))
        rest = iter(given)
        shown.append([next(rest) if image is None else image for image in flatten(messages)[1]])
    longest, limit = max(len(example.tokens) for example in examples), processor.config.decoder.max_positions
    new = requests[0].max_new_tokens or max(min(MAX_NEW_TOKENS, limit - longest), 1)
    if longest + new > limit:
        total = f"the longest prompt has {longest} tokens, images included: with max_new_tokens={new} that"
        raise ValueError(f"{total} exceeds the model's {limit} positions")
    generator = generator_of(model, processor, min(len(requests), MOST_SLOTS), longest + new)
    encoded = [
        dataclasses.replace(request, messages=example, images=(), max_new_tokens=new)
        for request, example in zip(requests, examples, strict=True)
    ]
    if stream:
        return generator.stream(encoded[0])
    replies = [samples[0] for samples in generator.generate(encoded)]
    answers = [Answer(reply, all_images) for reply, all_images in zip(replies, shown, strict=True)]
    return answers[0] if single else answers


def generator_of(model: PhiVision, processor: Processor, slots: int, length: int) -> LocalGenerator:
    """The generator that is kept for a model, with at least this many slots of this length."""
    kept = _generators.get(model)
    old = (kept.engine.slots, kept.length) if kept and kept.processor is processor else (1, 1024)
    # Powers of two, so that few sizes are ever compiled.
    slots, length = (max(size, 1 << (need - 1).bit_length()) for size, need in zip(old, (slots, length), strict=True))
    length = min(length, processor.config.decoder.max_positions)
    if kept is None or kept.processor is not processor or (slots, length) != old:
        _generators[model] = kept = LocalGenerator(model, processor, slots=slots, length=length)
    params, known = (jax.tree.leaves(tree) for tree in (model.split()[1], kept.engine.weights.model))
    if any(new is not old for new, old in zip(params, known, strict=True)):
        kept.update(model)
    return kept
