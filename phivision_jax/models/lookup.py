"""Embedding lookup in which each device reads only its own shard of the table.

Left to itself, the compiler may give every device the gradient of the entire table (2 GB) and sum it over all of them.
Here a device looks up its shard of D for all rows of the group that shares one replica of the parameters, and the
results are exchanged:

    tokens [rows of the group, T]     4 bytes each, gathered over the group
    table  [V / tensor, D / fsdp]  →  [rows of the group, T, D / fsdp]  ⇄  all-to-all  ⇄  [own rows, T, D]

The backward pass goes the same way: a device accumulates its own shard of the gradient, one row of the group at a time.
XLA would sort all rows at once (half a million tokens on a pod) and permute them before adding.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int32

from phivision_jax.sharding import constrain, dividing_rules, names_of, rule


def lookup(table: Float[Array, "V D"], tokens: Int32[Array, "B T"]) -> Float[Array, "B T D"]:
    """``table[tokens]``, in the table's dtype."""
    if jax.sharding.get_abstract_mesh().empty:
        return table[tokens]
    vocab, embed = rule("vocab"), rule("embed")
    rows, length = dividing_rules(("replica", "length"), tokens.shape)
    shards = names_of(vocab)
    table_axes = {*shards, *names_of(embed)}
    token_axes = {*names_of(rows), *names_of(length)}

    def local(table: jax.Array, tokens: jax.Array) -> jax.Array:
        here = tokens - jax.lax.axis_index(shards) * len(table)
        found = (here >= 0) & (here < len(table))
        # Both must vary over the same axes, so that shard_map itself sums the gradient over the tokens' axes.
        wide = jax.lax.pcast(table, tuple(token_axes - table_axes), to="varying")
        index = jax.lax.pcast(jnp.where(found, here, 0), tuple(table_axes - token_axes - {*shards}), to="varying")
        return jax.lax.psum(jnp.where(found[..., None], _take(wide, index), 0), shards)

    run = jax.shard_map(
        local,
        in_specs=(PartitionSpec(vocab, embed), PartitionSpec(rows, length)),
        out_specs=PartitionSpec(rows, length, embed),
    )
    return constrain(run(table, tokens), "batch", "length", "width")


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
