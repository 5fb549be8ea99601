"""The programs of generation: pure functions from a state to the next one, which is donated and updated in place.

    encode   patches of waiting images ──► vision tokens, kept in ``state.pool``
    admit    prefill: a packed row of prompts, or of pieces of prompts, ──► last hidden states, keys and values
             insert:  keys and values ──► the cache of each prompt's slot; the first token of each complete prompt
    decode   several tokens of every active slot

A slot is one sequence of the cache: S entries, of which the first ``lengths`` are in use. A piece of a prompt attends
to its own tokens in the row and to its prefix (the context): tokens that are in the cache already, of its own slot or
of another one that begins with the same tokens.

    row       a a a a b b c c c c c · · ·      segments 1 1 1 1 2 2 3 3 3 3 3 0 0 0
    context   B B B B B · · · C C C C · · ·    prefixes of b and c, each from a multiple of BLOCK on

Where attention knows ``last_query``, pieces that begin with the same tokens are a tree, in which these are computed
once:

    row       p p p p d d e e e f f f g · ·    three prompts: p p p p d d, p p p p e e e f f f and p p p p e e e g

What depends on a request is an array here, so settings never compile a program; only the sizes of ``Row``, and the
numbers of sequences and entries that decoding reads, are static. On a mesh each shard of "batch" has one row, its own
slots, and their prefixes.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Bool, Float, Int32

from phivision_jax.batch import Array, Batch
from phivision_jax.inference import kv_cache
from phivision_jax.inference.requests import MAX_TOP_LOGPROBS
from phivision_jax.inference.sampling import Chosen, Sampling, choose
from phivision_jax.models import phivision
from phivision_jax.models.attention.attend import attend
from phivision_jax.models.attention.cached import KV, attend_cached, store
from phivision_jax.models.phi4 import DecoderLayer
from phivision_jax.models.phivision import Params
from phivision_jax.sharding import constrain, override_rules, rule


@dataclasses.dataclass(frozen=True)
class Program:
    """Facts that all programs of one generator share; static, so part of what is compiled."""

    graphdef: nnx.GraphDef
    layer: nnx.GraphDef | None
    """The structure of one layer, where layers are separate arrays (see ``Engine``)."""
    decode_dtype: Any
    """Dtype of the activations in ``decode``, and of the hidden states that the head multiplies."""
    cache_dtype: Any
    copied: int
    """Tokens that are copied at a time from a row to the cache."""
    stop_ids: tuple[int, ...]
    think_id: int
    end_think_id: int
    """Ids of ``<think>`` and ``</think>``; −1 without a tokenizer."""


class Weights(NamedTuple):
    """The parameters of the model."""

    model: Params
    layers: list[Params] | None
    """Those of each decoder layer again, where layers are separate arrays."""


class Answering(NamedTuple):
    """The settings of B answers, and how far each is."""

    sampling: Sampling
    count: Int32[Array, " B"]
    """Tokens chosen so far."""
    limit: Int32[Array, " B"]
    """Tokens after which it ends."""
    in_thought: Bool[Array, " B"]
    budget: Int32[Array, " B"]
    """Further tokens of its thought, after which the thought is closed; negative for no limit."""


class State(NamedTuple):
    """Everything on the devices that lasts from one program to the next, for B slots of S entries."""

    cache: Any
    """``KV`` [L, B, K, S, H], or a list of L of them where layers are separate arrays."""
    pool: Float[Array, "pool D"]
    """Vision tokens of images."""
    lengths: Int32[Array, " B"]
    token: Int32[Array, " B"]
    """The last chosen token of each slot, which is not in the cache yet."""
    active: Bool[Array, " B"]
    answering: Answering


class Row(NamedTuple):
    """Pieces of prompts for each of R shards, made on the host (``scheduler.py``)."""

    tokens: Int32[Array, "R T"]
    positions: Int32[Array, "R T"]
    segment_ids: Int32[Array, "R T"]
    span_end: Int32[Array, "R T"]
    last_query: Int32[Array, "R T"] | None
    """The last position that sees each one; None where no two pieces share positions."""
    vision_index: Int32[Array, "R T"]
    """The place in ``state.pool`` of this position's vision token; −1 for text."""
    context_segments: Int32[Array, "R C"]
    context: Int32[Array, "R c 3"]
    """Slot to read, slot to write, and first entry, for each block of context."""
    num_context: Int32[Array, " R"]
    copies: Int32[Array, "R w 3"]
    """First position in the row, slot, and first entry, for each ``Program.copied`` tokens of the row to be cached.
    Where fewer belong together, what is behind them is copied too, and overwritten by the slot's next tokens."""
    num_copies: Int32[Array, " R"]
    ends: Int32[Array, "R E"]
    """Positions of the last tokens of complete prompts."""
    end_slots: Int32[Array, "R E"]
    """Their slots, numbered over all shards; B for none."""
    lengths: Int32[Array, "R E"]
    answering: Answering
    """[R, E] each."""


class Answers(NamedTuple):
    """The tokens that ``decode`` chose in n steps."""

    chosen: Chosen
    """[n, B, …]."""
    valid: Bool[Array, "n B"]
    """False after the end of a slot's answer."""


# ---------------------------------------------------------------------------------------------------------------------
# Encode.


def encode(program: Program, weights: Weights, state: State, batch: Batch, places: Int32[Array, "R T"]) -> State:
    """Encode images; the vision token at position t of row r of ``batch`` goes to ``places[r, t]`` of the pool."""
    model = phivision.merge(program.graphdef, weights.model)
    tokens = model.vision_tokens(batch)
    found = jnp.take_along_axis(tokens, jnp.maximum(batch.vision_index, 0)[..., None], axis=1)
    found = constrain(found, None, None, None).astype(state.pool.dtype).reshape(-1, found.shape[-1])
    return _pinned(state._replace(pool=state.pool.at[places.reshape(-1)].set(found, mode="drop")))


# ---------------------------------------------------------------------------------------------------------------------
# Admit: prefill and insert.


def prefill(program: Program, weights: Weights, state: State, row: Row) -> tuple[Float[Array, "R E D"], Any, Any]:
    """Last hidden states of complete prompts, ``KV`` [L, R, K, T, H] of the row's tokens, and that of its context."""
    model = phivision.merge(program.graphdef, weights.model)
    decoder = model.decoder
    embeds = decoder.embed_tokens(row.tokens).astype(decoder.dtype)
    seen = state.pool[jnp.maximum(row.vision_index, 0)].astype(decoder.dtype)
    embeds = jnp.where(row.vision_index[..., None] >= 0, seen, embeds)
    C = row.context_segments.shape[1]
    masks = {"segment_ids": row.segment_ids, "kv_segment_ids": None, "last_query": row.last_query}
    if C:
        masks["kv_segment_ids"] = jnp.concatenate([row.context_segments, row.segment_ids], axis=1)
    if C and row.last_query is not None:
        everybody = jnp.full_like(row.context_segments, row.tokens.shape[1])
        masks["last_query"] = jnp.concatenate([everybody, row.last_query], axis=1)

    def attention(q: jax.Array, k: jax.Array, v: jax.Array, context: KV | None) -> tuple[jax.Array, KV]:
        stored = store(k, v, program.cache_dtype)
        k, v = stored.values(q.dtype)  # as later tokens will see them
        if context is not None:
            k, v = (jnp.concatenate(pair, axis=1) for pair in zip(context.values(q.dtype), (k, v), strict=True))
        return attend(q, k, v, **masks, span_end=row.span_end + C), stored

    # Always scanned: that compiles faster, and copying a layer takes little time beside computing many tokens.
    shared = kv_cache.gather(state.cache, row.context) if C else None
    context = jax.tree.map(lambda *layers: jnp.stack(layers), *shared) if isinstance(shared, list) else shared
    hidden, stored = decoder.run(embeds, row.positions, attention, context)
    return jnp.take_along_axis(hidden, row.ends[..., None], axis=1), stored, shared


def insert(
    program: Program, weights: Weights, state: State, row: Row, hidden: jax.Array, stored: Any, shared: Any
) -> tuple[State, Chosen]:
    """Cache a row's keys and values, and choose the first token of each complete prompt.

    Returns:
      The state, and ``Chosen`` [R · E, …].
    """
    model = phivision.merge(program.graphdef, weights.model)
    places = row.context, row.num_context, row.copies, row.num_copies
    cache = kv_cache.insert(state.cache, stored, shared, *places, size=program.copied)
    slots, B = row.end_slots.reshape(-1), len(state.lengths)
    started = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), row.answering)
    logits = model.decoder.lm_head(hidden.astype(program.decode_dtype)).reshape(len(slots), -1)
    chosen, started, ended = _next(program, logits, started, slots < B)

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[slots].set(new, mode="drop")

    values = State(cache, state.pool, row.lengths.reshape(-1), chosen.token, ~ended, started)
    small = jax.tree.map(put, state[2:], values[2:])
    return _pinned(State(cache, state.pool, *small)), _replicated(chosen)


def admit(program: Program, weights: Weights, state: State, row: Row) -> tuple[State, Chosen]:
    """``prefill`` and ``insert``."""
    return insert(program, weights, state, row, *prefill(program, weights, state, row))


def _next(
    program: Program, logits: jax.Array, now: Answering, needed: jax.Array
) -> tuple[Chosen, Answering, jax.Array]:
    """Choose tokens; return them, how far the sequences then are, and which have ended."""
    close = now.in_thought & (now.budget == 0)
    forced = jnp.where(close, program.end_think_id, -1)
    chosen = choose(logits, now.sampling, now.count, forced, needed)
    token, first = chosen.token, now.count == 0
    opened = first & (token == program.think_id) & (program.think_id >= 0)
    in_thought = (now.in_thought | opened) & (token != program.end_think_id)
    budget = now.budget - ((now.in_thought | opened) & (now.budget > 0))
    count = now.count + needed
    ended = jnp.isin(token, jnp.array(program.stop_ids, jnp.int32)) if program.stop_ids else jnp.zeros_like(opened)
    after = now._replace(count=count, in_thought=in_thought, budget=budget)
    return chosen, after, ended | (count >= now.limit)


# ---------------------------------------------------------------------------------------------------------------------
# Decode.


def decode(
    program: Program, weights: Weights, state: State, keep: Bool[Array, " B"], steps: int, rows: int, read: int
) -> tuple[State, Answers]:
    """Choose up to ``steps`` tokens for every slot that is active and in ``keep``.

    Args:
      keep: False ends a slot's answer.
      rows: sequences to compute, at least as many as in ``keep``; all slots where layers are not separate arrays.
      read: entries of the cache that slots may have in use.
    """
    slots = None if rows == len(keep) else jnp.argsort(~keep)[:rows]  # those to keep come first
    now = state._replace(active=state.active & keep)[2:]
    if slots is not None:
        now = jax.tree.map(lambda x: x[slots], now)
    recent, after, answers = _steps(program, weights, state.cache, slots, now, steps, read)
    # What other slots computed goes to their last entries, which are never used (``Engine``).
    last = jax.tree.leaves(state.cache)[0].shape[-2] - steps
    lengths, _, active, _ = now
    cache = kv_cache.append(state.cache, recent, jnp.where(active, lengths, last), slots)
    if slots is not None:
        others = state._replace(active=jnp.zeros_like(keep))[2:]
        after = jax.tree.map(lambda x, y: x.at[slots].set(y), others, after)
        nothing = jax.tree.map(lambda x: jnp.zeros((steps, len(keep), *x.shape[2:]), x.dtype), answers)
        answers = jax.tree.map(lambda x, y: x.at[:, slots].set(y), nothing, answers)
    return _pinned(State(cache, state.pool, *after)), _replicated(answers)


def _steps(
    program: Program, weights: Weights, cache: Any, slots: jax.Array | None, before: tuple, steps: int, read: int
) -> tuple[Any, tuple, Answers]:
    """Choose up to ``steps`` tokens for B sequences.

    Args:
      slots: those of the sequences; None for all of the cache.
      before: lengths, tokens, active and answering, as in ``State``.

    Returns:
      ``KV`` [L, B, K, steps, H] of the tokens, or a list of L of them; ``before`` after the steps; the tokens.
    """
    model = phivision.merge(program.graphdef, weights.model)
    layers, decoder = _layers(program, weights), model.decoder
    decoder.dtype = program.decode_dtype
    cached = before[0]
    B, k = len(cached), min(MAX_TOP_LOGPROBS, model.config.decoder.vocab_size)
    nothing = Chosen(*(jnp.zeros((steps, B, *more), dtype) for more, dtype in (
        ((), jnp.int32), ((), jnp.float32), ((k,), jnp.int32), ((k,), jnp.float32))))  # fmt: skip

    def empty(x: jax.Array) -> jax.Array:
        *lead, _, K, _, H = x.shape
        return jnp.zeros((*lead, B, K, steps, H), x.dtype)

    def put(recent: Any, new: Any, i: jax.Array) -> Any:
        return jax.tree.map(lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, i, axis=x.ndim - 2), recent, new)

    def more(carry: tuple) -> jax.Array:
        i, _, (_, _, active, _), _ = carry
        return (i < steps) & active.any()

    def step(carry: tuple) -> tuple:
        i, recent, (lengths, token, active, answering), answers = carry

        def attention(q: jax.Array, k: jax.Array, v: jax.Array, inputs: tuple) -> tuple[jax.Array, KV]:
            recent, which = inputs
            keys, layer = (cache, which) if layers is None else (which, None)
            new = store(k, v, program.cache_dtype)
            recent = put(recent, new, i)
            seen = jnp.where(active, cached, 0)
            out = attend_cached(q[:, 0], keys, seen, recent, i, slots=slots, layer=layer, read=read)
            return out[:, None], new

        embeds = decoder.embed_tokens(token[:, None])
        numbers = jnp.arange(model.config.decoder.num_layers)
        inputs = (recent, numbers) if layers is None else list(zip(recent, cache, strict=True))
        hidden, new = decoder.run(embeds, lengths[:, None], attention, inputs, layers)
        recent = put(recent, new, i)  # once: as outputs of the layers, all buffers would be moved at each layer
        logits = decoder.lm_head(hidden)[:, 0]
        chosen, answering, ended = _next(program, logits, answering, active)
        answers = jax.tree.map(lambda x, y: x.at[i].set(y), answers, Answers(_replicated(chosen), active))
        return i + 1, recent, (lengths + active, chosen.token, active & ~ended, answering), answers

    answers = Answers(nothing, jnp.zeros((steps, B), bool))
    # Tokens are few and weights large: every device multiplies its shard of the weights with all tokens, and sums are
    # exchanged, not weights.
    with override_rules({"batch": rule("replica"), "width": rule("embed")}):
        carry = (jnp.int32(0), jax.tree.map(empty, cache), before, answers)
        return jax.lax.while_loop(more, step, carry)[1:]


def _layers(program: Program, weights: Weights) -> list[DecoderLayer] | None:
    """The layers, where they are separate arrays."""
    if weights.layers is None or program.layer is None:
        return None
    return [nnx.merge(program.layer, dict(layer)) for layer in weights.layers]


def _replicated[T](tree: T) -> T:
    return jax.tree.map(lambda x: constrain(x, *[None] * x.ndim), tree)


def _pinned(state: State) -> State:
    """The state with the shardings that it always has, so that every program takes what another returned."""
    if jax.sharding.get_abstract_mesh().empty:
        return state
    cache = jax.tree.map(jax.lax.with_sharding_constraint, state.cache, kv_cache.partition_specs(state.cache))
    return State(cache, *_replicated(state[1:]))
