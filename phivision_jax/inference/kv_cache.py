"""The cache of keys and values: blocks of it are copied to rows, from rows, and between slots.

A cache is a ``KV`` of arrays [L, B, K, S, H], or a list of L of them [B, K, S, H] where layers are separate arrays, so
axes are counted from the end. On a mesh each device copies between its own slots, of its own heads.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Int32

from phivision_jax.batch import Array
from phivision_jax.sharding import axis_size, rule

BLOCK = 128
"""Tokens that are copied at a time from the cache to a row, and from a row to the cache on accelerators."""


def _starts(x: jax.Array, slot: jax.Array | int, entry: jax.Array | int) -> tuple:
    return (0,) * (x.ndim - 4) + (slot, 0, entry, 0)


def _copy(to: Any, source: Any, size: int, target: tuple, origin: tuple) -> Any:
    """Copy ``size`` entries of one sequence, from (slot, entry) ``origin`` to ``target``."""

    def one(x: jax.Array, y: jax.Array) -> jax.Array:
        sizes = list(y.shape)
        sizes[-4], sizes[-2] = 1, size
        return jax.lax.dynamic_update_slice(
            x, jax.lax.dynamic_slice(y, _starts(y, *origin), sizes), _starts(x, *target)
        )

    return jax.tree.map(one, to, source)


def gather(cache: Any, context: Int32[Array, "R c 3"]) -> Any:
    """``KV`` [(L,) R, K, C, H] of the prefixes that the pieces of rows attend to; see ``programs.Row``."""

    def local(cache: Any, context: jax.Array) -> Any:
        def one(x: jax.Array) -> jax.Array:
            sizes = (*x.shape[:-4], 1, x.shape[-3], BLOCK, x.shape[-1])

            def block(place: jax.Array) -> jax.Array:
                source, _, entry = place
                return jax.lax.dynamic_slice(x, _starts(x, source, entry), sizes)

            blocks = jnp.moveaxis(jax.vmap(block)(context[0]), 0, -3)
            return blocks.reshape(*sizes[:-2], -1, sizes[-1])

        # A loop that copies blocks one by one would carry the cache, and XLA for CPUs copies what loops carry.
        return jax.tree.map(one, cache)

    # Read once, before anything is written: XLA would otherwise read again later, and keep a copy of the cache for it.
    return jax.lax.optimization_barrier(_on_shards(local, cache, (context,)))


def insert(
    cache: Any,
    stored: Any,
    shared: Any,
    context: Int32[Array, "R c 3"],
    num_context: Int32[Array, " R"],
    copies: Int32[Array, "R w 3"],
    num_copies: Int32[Array, " R"],
    size: int,
) -> Any:
    """The cache with the prefixes that rows share with other slots, and with the rows' own keys and values.

    Args:
      stored: ``KV`` [L, R, K, T, H] of the rows' tokens.
      shared: what ``gather`` returned; None for rows without context.
      context, num_context, copies, num_copies: as in ``programs.Row``.
      size: tokens of each of ``copies``.
    """
    stored = jax.tree.map(lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, size), (0, 0)]), stored)
    if isinstance(cache, list):
        stored = [jax.tree.map(lambda x, i=i: x[i], stored) for i in range(len(cache))]

    def copy_blocks(size: int, cache: Any, rows: Any, places: jax.Array, count: jax.Array) -> Any:
        def copy(i: jax.Array, cache: Any) -> Any:
            position, slot, entry = places[0, i]
            return _copy(cache, rows, size, (slot, entry), (0, position))

        return jax.lax.fori_loop(0, count[0], copy, cache)

    # Prefixes are written from what was gathered of them: a loop that also read the cache would not be ordered behind
    # the gathering, and XLA would copy the cache to keep what that reads.
    if shared is not None:
        positions = jnp.broadcast_to(jnp.arange(context.shape[1]) * BLOCK, context.shape[:2])
        places = context.at[..., 0].set(positions)
        cache = _on_shards(partial(copy_blocks, BLOCK), cache, (places, num_context), shared)
    return _on_shards(partial(copy_blocks, size), cache, (copies, num_copies), stored)


def append(cache: Any, recent: Any, places: jax.Array, slots: jax.Array | None = None) -> Any:
    """The cache with the tokens of one call of ``decode``, from entry ``places[b]`` of slot b on.

    Args:
      recent: as the cache, with n entries.
      slots: on one device, the slot of each b where ``recent`` has only some of the cache's.
    """

    def local(cache: Any, recent: Any, places: jax.Array, slots: jax.Array | None = None) -> Any:
        steps = jax.tree.leaves(recent)[0].shape[-2]

        def one(b: jax.Array, cache: Any) -> Any:
            return _copy(cache, recent, steps, (b if slots is None else slots[b], places[b]), (b, 0))

        return jax.lax.fori_loop(0, len(places), one, cache)

    return _on_shards(local, cache, (places,) if slots is None else (places, slots), recent)


def partition_specs(cache: Any) -> Any:
    """The PartitionSpec of every array of a cache: slots over "slots", heads over "kv_heads" if they divide."""

    def spec(x: jax.Array) -> PartitionSpec:
        heads = rule("kv_heads") if x.shape[-3] % axis_size("kv_heads") == 0 else None
        return PartitionSpec(*[None] * (x.ndim - 4), rule("slots"), heads)

    return jax.tree.map(spec, cache)


def _on_shards(local: Any, cache: Any, arguments: tuple, stored: Any = None) -> Any:
    """``local(cache, stored, *arguments)`` on each device's slots and heads; arguments are split by their rows."""
    trees = (cache,) if stored is None else (cache, stored)
    if jax.sharding.get_abstract_mesh().empty:
        return local(*trees, *arguments)
    specs = *map(partition_specs, trees), *(PartitionSpec(rule("slots")) for _ in arguments)
    # check_vma: loops over a device's own slots have constant carries.
    return jax.shard_map(local, in_specs=specs, out_specs=specs[0], check_vma=False)(*trees, *arguments)
