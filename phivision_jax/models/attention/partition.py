"""Attention on each device's own shard: its rows, its heads, its queries, and all keys of its rows.

Kernels and loops over blocks know nothing of shardings: a loop over a sharded axis would gather it. ``shard_map``
makes the shards explicit; along ``context`` a row's queries are split and its keys are gathered.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int32

from phivision_jax.sharding import axis_size, dividing_rules, rule


def shard_map_attention(
    fn: Callable[..., jax.Array],
    q: Float[Array, "*B T N H"],
    k: Float[Array, "*B S K H"],
    v: Float[Array, "*B S K H"],
    query_args: tuple[Int32[Array, "*B T"] | None, ...],
    key_args: tuple[Int32[Array, "*B S"] | None, ...] = (),
    *,
    axes: tuple[str | None, ...],
) -> Float[Array, "*B T N H"]:
    """``fn(q, k, v, *query_args, *key_args)`` on each device's shard; called directly when no mesh is in force.

    Args:
      query_args, key_args: integers per query or per key, such as segment ids.
      axes: logical names of q's axes except the last; an axis whose size its mesh axes do not divide is not split.
    """
    K, head_axis = k.shape[-2], axes[-1] or "head_dim"
    # Each device needs complete groups of heads: repeat the keys as often as that takes, or else do not split heads.
    repeat = math.lcm(K, axis_size(head_axis)) // K
    split_heads = q.shape[-2] % (K * repeat) == 0
    if split_heads and repeat > 1:
        k, v = jnp.repeat(k, repeat, axis=-2), jnp.repeat(v, repeat, axis=-2)
    if jax.sharding.get_abstract_mesh().empty:
        return fn(q, k, v, *query_args, *key_args)
    *lead, length = dividing_rules(axes[:-1], q.shape[:-2])
    heads = rule(head_axis) if split_heads else None
    queries, keys = PartitionSpec(*lead, length, heads), PartitionSpec(*lead, None, heads)
    specs = [None if x is None else PartitionSpec(*lead, length) for x in query_args]
    specs += [None if x is None else PartitionSpec(*lead) for x in key_args]
    # check_vma: kernels do not declare over which mesh axes their results vary, and constant carries vary over none.
    run = jax.shard_map(fn, in_specs=(queries, keys, keys, *specs), out_specs=queries, check_vma=False)
    return run(q, k, v, *query_args, *key_args)
