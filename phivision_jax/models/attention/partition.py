"""A computation of attention on each device's own part: its rows, its heads, its queries, and all keys of its rows.

Kernels and loops over blocks know no shardings: a loop over a sharded axis would gather it. So the parts are made by
hand, with ``shard_map``: along ``context`` the queries of a row are split and its keys gathered.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int32

from phivision_jax.sharding import RULES, axis_size


def by_device(
    local: Callable[..., jax.Array],
    q: Float[Array, "*B T N H"],
    k: Float[Array, "*B S K H"],
    v: Float[Array, "*B S K H"],
    of_queries: tuple[Int32[Array, "*B T"] | None, ...],
    of_keys: tuple[Int32[Array, "*B S"], ...] = (),
    *,
    axes: tuple[str | None, ...],
) -> Float[Array, "*B T N H"]:
    """``local`` of q, k, v, and of what is told of queries and of keys; on each device's part, whole without a mesh.

    Args:
      of_queries, of_keys: numbers of each column, such as its segment.
      axes: logical names of q's axes but the last; an axis that its mesh axes do not divide is not split.
    """
    *rows, T, N, _ = q.shape
    K, head_axis = k.shape[-2], axes[-1] or "head_dim"
    # A device's share of the heads must be whole groups: keys are repeated as often as that takes, or heads not split.
    repeat = math.lcm(K, axis_size(head_axis)) // K
    split_heads = N % (K * repeat) == 0
    if split_heads and repeat > 1:
        k, v = jnp.repeat(k, repeat, axis=-2), jnp.repeat(v, repeat, axis=-2)
    if jax.sharding.get_abstract_mesh().empty:
        return local(q, k, v, *of_queries, *of_keys)
    *lead, length = (
        RULES[axis] if axis and size % axis_size(axis) == 0 else None
        for axis, size in zip(axes[:-1], (*rows, T), strict=True)
    )
    heads = RULES[head_axis] if split_heads else None
    queries, keys = PartitionSpec(*lead, length, heads), PartitionSpec(*lead, None, heads)
    specs = [None if x is None else PartitionSpec(*lead, length) for x in of_queries]
    specs += [PartitionSpec(*lead)] * len(of_keys)
    # check_vma: kernels do not say over which mesh axes their results vary, and constant carries vary over none.
    run = jax.shard_map(local, in_specs=(queries, keys, keys, *specs), out_specs=queries, check_vma=False)
    return run(q, k, v, *of_queries, *of_keys)
