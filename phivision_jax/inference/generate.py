"""Batched generation: prompts and images in, answers out.

A row's answer does not depend on the other rows: padding is never attended to, and a row may have any number of images
or none (the released code's batched generation is wrong there).

The KV cache holds keys and values of every layer. Prompts are padded on the right to T tokens; in every row the
generated tokens follow at index T, T+1, … of the cache. Segments mark the entries in use, so padding between a short
prompt and its answer is never seen, and RoPE positions continue from the prompt's own length:

    index        0  1  2  3  4 | 5  6  7
    row 0        a  b  c  d  e | x  y  ·       positions  0 1 2 3 4 | 5 6
    row 1        a  b  ·  ·  · | x  y  ·       positions  0 1       | 2 3
    segments     1  1  0  0  0 | 1  1  0       (row 1)
"""

import contextlib
import functools
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jaxtyping import Array, Float, Int32

from phivision_jax import sharding
from phivision_jax.batch import Batch
from phivision_jax.images.sources import listed
from phivision_jax.io.messages import shorten
from phivision_jax.models import phivision
from phivision_jax.models.phivision import PhiVision
from phivision_jax.processor import Processor
from phivision_jax.text.constants import IMAGE_MARKER, PromptMode

MAX_NEW_TOKENS = 4096
"""Default limit of an answer with thoughts, as in the published evaluations."""
LENGTH_MULTIPLE = 128
"""Prompts and patches are padded to multiples of this, so that few shapes are compiled."""


def generate(
    model: PhiVision,
    processor: Processor,
    prompt: str | Sequence[Any] | Mapping[str, Any],
    images: Any = None,
    *,
    mode: PromptMode = "auto",
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> str | list[str]:
    """Answer a prompt with or without images, or a batch of prompts.

        generate(model, processor, "What colour is the car?", images="photo.jpg")       # one answer
        generate(model, processor, ["What is this?", "And 2 + 2?"], images=[[photo], []])  # a list of answers

    Args:
      prompt: a question or a conversation (a message or a list of them, see ``text.chat``); or a list of questions and
        conversations.
      images: one image or a list, each as ``images.sources`` takes it; for a list of prompts, a list of these. They
        replace ``<image>`` markers in order; a single question without markers gets its images in front.
      mode: "think" and "nothink" force the answer to begin so, "auto" leaves it to the model.
      max_new_tokens: limit for answers that do not end by themselves; default: ``MAX_NEW_TOKENS``, or as many as the
        model's positions leave. The cache is made for all of them.
      temperature: 0 always takes the most likely token (as the published evaluations do).
      top_p: probability mass of the nucleus to sample from, at a temperature above 0.
      seed: of the sampling.

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
    conversations = [_conversation(p, len(i)) for p, i in zip(prompts, images_of, strict=True)]
    batch = processor.batch(conversations, images_of, mode=mode, multiple=LENGTH_MULTIPLE)
    longest, limit = int((batch.segment_ids > 0).sum(1).max()), processor.config.decoder.max_positions
    if max_new_tokens is None:
        max_new_tokens = max(min(MAX_NEW_TOKENS, limit - longest), 1)
    max_new_tokens = _number("max_new_tokens", max_new_tokens)
    if longest + max_new_tokens > limit:
        total = f"the longest prompt has {longest} tokens, images included: with {max_new_tokens=} that"
        raise ValueError(f"{total} exceeds the model's {limit} positions")
    sampling: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "seed": seed}
    stop_ids = processor.config.decoder.stop_ids
    ids = generate_ids(model, batch, max_new_tokens=max_new_tokens, eos_id=stop_ids, **sampling)
    answers = [answer_text(processor, row, mode) for row in ids]
    return answers[0] if single else answers


def generate_ids(
    model: PhiVision,
    batch: Batch,
    *,
    max_new_tokens: int,
    eos_id: int | tuple[int, ...] | None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> np.ndarray:
    """Continue each row of a batch of prompts, on the devices that the model's parameters are on.

    Args:
      batch: one example per row, from position 0; the same on every process.
      eos_id: the token or tokens that end an answer; None to always generate ``max_new_tokens``.

    Returns:
      [B, max_new_tokens] i32; a row that has ended is filled up with the first ``eos_id``.

    Raises:
      ValueError: for a packed batch, an empty row, or a setting out of range.
    """
    settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    max_new_tokens, temperature, top_p, seed = (_number(name, value) for name, value in settings.items())
    segments = np.asarray(batch.segment_ids)
    if segments.max(initial=0) > 1 or not (segments[:, 0] == 1).all():
        raise ValueError("generation takes one example per row: this batch is packed or has an empty row")
    graphdef, params = model.split()
    in_force: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if mesh := sharding.mesh_of(params):
        in_force, rows = jax.set_mesh(mesh), sharding.row_sharding(mesh)
        # Rows must divide over the mesh: the first ones are repeated, and their further answers left out.
        order = np.arange(-len(segments) % sharding.num_shards(mesh, "batch") + len(segments)) % len(segments)
        arrays = jax.tree.map(lambda x: np.asarray(x)[order], batch)
        batch = jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, rows, x.__getitem__), arrays)
    limits = max_new_tokens, eos_id if isinstance(eos_id, tuple) else (-1 if eos_id is None else eos_id,)
    with in_force:
        ids = generate_tokens(graphdef, params, batch, jax.random.key(seed), *limits, temperature, top_p)
        ids = ids if ids.is_fully_addressable else multihost_utils.process_allgather(ids, tiled=True)
    return np.asarray(ids)[: len(segments)]


@functools.partial(jax.jit, static_argnums=(0, 4, 5, 6, 7))
def generate_tokens(
    graphdef: nnx.GraphDef,
    params: phivision.Params,
    batch: Batch,
    key: jax.Array,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    temperature: float,
    top_p: float,
) -> jax.Array:
    """Prefill and decode in one program, [B, max_new_tokens] i32; ``generate_ids`` checks the arguments."""
    model = phivision.merge(graphdef, params)
    decoder = model.decoder
    B, T = batch.tokens.shape
    lengths = (batch.segment_ids > 0).sum(1)  # [B]

    def choose(hidden: jax.Array, step: jax.Array | int) -> jax.Array:
        """The next token [B] from hidden [B, 1, D]."""
        step_key = jax.random.fold_in(key, step)
        return sample(decoder.lm_head(hidden)[:, 0], step_key, temperature=temperature, top_p=top_p)

    cfg, size = model.config.decoder, T + max_new_tokens
    empty = jnp.zeros((cfg.num_layers, B, size, cfg.num_kv_heads, cfg.head_dim), decoder.dtype)
    segments = jnp.pad(batch.segment_ids, ((0, 0), (0, max_new_tokens)))  # [B, S] of the cache; 0 for empty entries
    prompts = model.embeds(batch), batch.positions, batch.span_end, batch.segment_ids
    hidden, cache = decoder(*prompts, cache=(empty, empty), cache_segments=segments)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)  # [B, 1, D]
    token = choose(last, 0)
    stops = jnp.array(stop_ids, jnp.int32)
    out = jnp.full((B, max_new_tokens), stops[0], jnp.int32).at[:, 0].set(token)

    def unfinished(carry: tuple) -> jax.Array:
        return (carry[0] < max_new_tokens) & ~carry[2].all()

    def decode(carry: tuple) -> tuple:
        """Feed token i−1, whose cache entry is T+i−1, and choose token i."""
        i, token, done, out, segments, cache = carry
        entry = T + i - 1
        used = jnp.ones((B, 1), jnp.int32)
        segments = jax.lax.dynamic_update_slice_in_dim(segments, used, entry, axis=1)
        last = decoder.embed_tokens(token[:, None]), (lengths + i - 1)[:, None], jnp.full((B, 1), entry), used
        hidden, cache = decoder(*last, cache=cache, cache_segments=segments, offset=entry)
        token = jnp.where(done, stops[0], choose(hidden, i))
        out = jax.lax.dynamic_update_slice_in_dim(out, token[:, None], i, axis=1)
        return i + 1, token, done | jnp.isin(token, stops), out, segments, cache

    carry = (jnp.int32(1), token, jnp.isin(token, stops), out, segments, cache)
    return jax.lax.while_loop(unfinished, decode, carry)[3]


def sample(
    logits: Float[Array, "B V"], key: jax.Array, *, temperature: float = 0.0, top_p: float = 1.0
) -> Int32[Array, " B"]:
    """Greedy at temperature 0, else sampled from the nucleus: the fewest tokens whose probability reaches ``top_p``."""
    if temperature == 0.0:
        return logits.argmax(-1).astype(jnp.int32)
    # The largest becomes 0 before the division, which then overflows for none but hopeless tokens.
    logits = (logits.astype(jnp.float32) - logits.max(-1, keepdims=True)) / max(temperature, 1e-30)
    if top_p < 1.0:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probability = jax.nn.softmax(ordered, axis=-1)
        # A token is in the nucleus if the tokens before it have not reached top_p; the first always is, as top_p > 0.
        kept = jnp.cumsum(probability, axis=-1) - probability < top_p
        threshold = jnp.where(kept, ordered, jnp.inf).min(-1, keepdims=True)
        logits = jnp.where(logits >= threshold, logits, -jnp.inf)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


def answer_text(processor: Processor, ids: np.ndarray, mode: PromptMode = "auto") -> str:
    """The text of generated ids up to the first token that ends an answer; thoughts keep their tags."""
    eos = np.flatnonzero(np.isin(ids, processor.config.decoder.stop_ids))
    ids = ids[: eos[0]] if len(eos) else ids
    # A vocabulary padded beyond its tokenizer can yield ids without a text.
    text = processor.decode(ids[ids < processor.tokenizer.vocab_size])
    # In mode "think" the opening tag is part of the prompt; the answer shows it.
    return ("<think>" + text if mode == "think" else text).strip()


def _conversation(prompt: Any, num_images: int) -> list[Any]:
    """A prompt as a list of messages; images without markers come first in its only message."""
    if isinstance(prompt, str):
        prompt = {"role": "user", "content": prompt}
    messages = list(prompt) if isinstance(prompt, Sequence) else [prompt]
    content = messages[0].get("content") if len(messages) == 1 and isinstance(messages[0], Mapping) else None
    if isinstance(content, str) and IMAGE_MARKER not in content:
        return [{**messages[0], "content": (IMAGE_MARKER + "\n") * num_images + content}]
    return messages


_NUMBERS: Mapping[str, tuple[str, float, float]] = {
    "max_new_tokens": ("an integer of at least 1", 1, 2**31),
    "temperature": ("a number of at least 0", 0, 1e308),
    "top_p": ("a number above 0 and at most 1", 1e-30, 1),
    "seed": ("an integer of 63 bits", -(2**63), 2**63 - 1),
}


def _number(name: str, value: Any) -> Any:
    """A setting as an int or a float.

    Raises:
      ValueError: for anything but a finite number in its range.
    """
    wanted, least, most = _NUMBERS[name]
    kind: Any = int if "integer" in wanted else float
    is_number = issubclass(type(value), numbers.Real) and not isinstance(value, bool)
    if not is_number or not least <= value <= most or (kind is int and value != int(value)):
        raise ValueError(f"{name} must be {wanted}, not {shorten(value)}")
    return kind(value)
