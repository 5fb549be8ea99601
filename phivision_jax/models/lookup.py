"""Rows of the embedding table, each device looking in the part of it that it holds.

Left to itself, the compiler may give every device the whole gradient of the table (2 GB) and sum it over all of them.
Written out, a device looks up its columns of D for all rows of the group that shares one copy of the parameters, and
the results are exchanged:

    tokens [rows of the group, T]     4 bytes each, gathered over the group
    table  [V / tensor, D / fsdp]  →  [rows of the group, T, D / fsdp]  ⇄  all-to-all  ⇄  [own rows, T, D]

Backward the same way: what a device adds up is its own part of the gradient, a row of the group at a time. All rows
at once (half a million tokens on a pod) would be sorted by XLA and brought into that order before they are added.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int32

from phivision_jax.sharding import RULES, axis_size, constrain, names_of


def lookup(table: Float[Array, "V D"], tokens: Int32[Array, "B T"]) -> Float[Array, "B T D"]:
    """``table[tokens]``, in the table's dtype."""
    if jax.sharding.get_abstract_mesh().empty:
        return table[tokens]
    shards = names_of(RULES["vocab"])
    rows, columns = (
        RULES[axis] if size % axis_size(axis) == 0 else None
        for axis, size in zip(("copy", "length"), tokens.shape, strict=True)
    )
    table_axes = {*shards, *names_of(RULES["embed"])}
    token_axes = {*names_of(rows), *names_of(columns)}

    def local(table: jax.Array, tokens: jax.Array) -> jax.Array:
        here = tokens - jax.lax.axis_index(shards) * len(table)
        found = (here >= 0) & (here < len(table))
        # Both must vary over the same axes: it is then shard_map that adds up the gradient over the tokens'.
        wide = jax.lax.pcast(table, tuple(token_axes - table_axes), to="varying")
        index = jax.lax.pcast(jnp.where(found, here, 0), tuple(table_axes - token_axes - {*shards}), to="varying")
        return jax.lax.psum(jnp.where(found[..., None], _take(wide, index), 0), shards)

    part = jax.shard_map(
        local,
        in_specs=(PartitionSpec(RULES["vocab"], RULES["embed"]), PartitionSpec(rows, columns)),
        out_specs=PartitionSpec(rows, columns, RULES["embed"]),
    )
    return constrain(part(table, tokens), "batch", "length", None)


@jax.custom_vjp
def _take(table: Float[Array, "V D"], index: Int32[Array, "B T"]) -> Float[Array, "B T D"]:
    return table[index]


def _forward(table: jax.Array, index: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return table[index], (table, index)


def _backward(saved: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, None]:
    table, index = saved

    def add(total: jax.Array, row: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        return total.at[row[0]].add(row[1]), None

    return jax.lax.scan(add, jnp.zeros_like(table), (index, gradient))[0], None


_take.defvjp(_forward, _backward)
