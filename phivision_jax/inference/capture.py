"""Hidden states and attention weights of chosen layers, and weights of vision tokens laid over their image.

example = processor.encode(messages, images, generation_prompt=True)
batch = rows.one_per_row([example], model.config)
found = capture(model, batch, layers=[10, 20], queries=[len(example.tokens) - 1])
found.hidden, found.attention                        # [2, 1, 1, D] and [2, 1, N, 1, T]
(heat,) = patch_maps(found.attention[1, 0].mean(0)[0], example)
overlay(image, heat)                                 # the second of these layers, the mean of its heads
"""

import contextlib
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float
from PIL import Image

from phivision_jax import sharding
from phivision_jax.batch import Batch
from phivision_jax.images.decode import to_rgb
from phivision_jax.models import phivision
from phivision_jax.models.attention.blockwise import attention_weights
from phivision_jax.models.layers import rope_angles
from phivision_jax.models.phi4 import DecoderLayer, attend_in_row
from phivision_jax.models.phivision import PhiVision
from phivision_jax.rows import Example


class Captured(NamedTuple):
    """Values of l chosen layers, in the order in which they were chosen."""

    hidden: Float[Array, "l B q D"]
    """The residual stream after each layer, in the dtype of the computation; after the last layer the model applies its
    final norm. At the q queries, or at all T positions."""
    attention: Float[Array, "l B N q T"] | None
    """fp32 weights of each head over the keys of the row, which add up to 1; None without queries."""


def capture(model: PhiVision, batch: Batch, layers: Sequence[int], queries: Any = None) -> Captured:
    """Run the model on a batch and keep hidden states and attention weights of chosen decoder layers.

    The layers run as in ``model.hidden``, with kernels where there are any; weights are computed beside them as the
    reference computes attention, only for the chosen layers and queries. Memory grows with the size of the result,
    never with T². To see what generated tokens attend to, put the answer into the batch (``generation_prompt=False``).

    Args:
      batch: any batch, also packed; it is placed on the mesh that the model's parameters are on.
      layers: numbers of decoder layers, from 0; negative ones count from the last.
      queries: positions whose states and weights are kept: integers [q] for all rows, or [B, q] within each row; None
        for the hidden states of all positions, and no weights.

    Raises:
      ValueError: for layers or queries that do not exist, or a layer that is chosen twice.
    """
    (B, T), L = batch.tokens.shape, model.config.decoder.num_layers
    if not layers or not all(-L <= i < L for i in layers) or len({i % L for i in layers}) < len(layers):
        raise ValueError(f"layers are {list(layers)}: choose one or several different ones of 0 to {L - 1}")
    slots = np.full(L, len(layers), np.int32)
    slots[list(layers)] = np.arange(len(layers))
    if queries is not None:
        queries = np.asarray(queries)
        if queries.dtype.kind != "i" or queries.size == 0 or queries.min() < 0 or queries.max() >= T:
            raise ValueError(f"queries must be positions from 0 to {T - 1}, not {queries.tolist()}")
        queries = np.broadcast_to(queries, (B, queries.shape[-1])).astype(np.int32)
    graphdef, params = model.split()
    mesh = sharding.mesh_of(params)
    if mesh is not None:
        order = np.arange(B + -B % sharding.num_shards(mesh, "batch")) % B  # rows must divide: the first are repeated
        rows = sharding.row_sharding(mesh)
        batch, queries = jax.tree.map(lambda x: jax.device_put(np.asarray(x)[order], rows), (batch, queries))
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        found = _captured(graphdef, len(layers), params, batch, slots, queries)
    return jax.tree.map(lambda x: x[:, :B], found)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _captured(graphdef, num_slots: int, params, batch: Batch, slots, queries) -> Captured:
    """``slots`` [L] has the place of each layer in the result, ``num_slots`` for those that are not kept.

    ``queries`` are [B, q] or None.
    """
    model = phivision.merge(graphdef, params)
    decoder = model.decoder
    rope, segments = rope_angles(batch.positions, decoder.head_dim, decoder.rope_theta), batch.segment_ids
    B, T = segments.shape

    def at_queries(x: jax.Array) -> jax.Array:
        return x if queries is None else jax.vmap(lambda row, q: row[q])(x, queries)

    def attention(q: jax.Array, k: jax.Array, v: jax.Array, slot: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        def weights() -> Float[Array, "B N q T"]:
            masks = at_queries(segments), segments, at_queries(batch.span_end)
            return rearrange(attention_weights(at_queries(q), k, *masks), "B K G T S -> B (K G) T S")

        out, _ = attend_in_row(segments, batch.span_end)(q, k, v, None)
        if queries is None:
            return out, None
        return out, jax.lax.cond(slot < num_slots, weights, lambda: jnp.zeros(shape, jnp.float32))

    def body(carry: tuple[jax.Array, Captured], layer_and_slot: tuple[DecoderLayer, jax.Array]) -> tuple[Any, None]:
        (x, kept), (layer, slot) = carry, layer_and_slot
        x, found = layer(x, rope, attention, slot)
        values = Captured(at_queries(x), found)
        kept = jax.tree.map(lambda array, value: array.at[slot].set(value, mode="drop"), kept, values)
        return (x, kept), None

    x = sharding.constrain(model.embeds(batch).astype(decoder.dtype), "batch", "length", None)
    hidden = jnp.zeros((num_slots, *at_queries(x).shape), x.dtype)
    shape = B, model.config.decoder.num_heads, hidden.shape[2], T
    kept = Captured(hidden, None if queries is None else jnp.zeros((num_slots, *shape), jnp.float32))
    return jax.lax.scan(body, (x, kept), (decoder.layers, slots))[0][1]


def patch_maps(weights: Float[Any, "*x T"], example: Example, image: int = 0) -> list[np.ndarray]:
    """Distribute the weights of an image's tokens over the patches that they were computed from.

    A token that combines several features shares its weight among them as its merge table does. The maps of all tiles
    together have the sum of the weights.

    Args:
      weights: of the positions of the example, such as attention; leading axes are kept.
      image: number of the image in the example.

    Returns:
      [*x, rows, columns] f64 for each tile of the image. An image of one tile (NaFlex) is covered by it.
    """
    start, patched = example.image_starts[image], example.images[image]
    values = np.asarray(weights, np.float64)[..., start : start + patched.size.tokens]
    if patched.merge_index is not None and patched.merge_weight is not None:
        index, weight = patched.merge_index, np.where(patched.merge_index < 0, 0.0, np.abs(patched.merge_weight))
        table = np.zeros((len(index), len(patched.patches)))
        np.add.at(table, (np.arange(len(index))[:, None, None], index), weight)
        values = values @ (table / np.maximum(table.sum(1, keepdims=True), 1e-30))
    ends = np.cumsum([rows * columns for rows, columns in patched.grids])[:-1]
    tiles = zip(np.split(values, ends, axis=-1), patched.grids, strict=True)
    return [tile.reshape(*tile.shape[:-1], *grid) for tile, grid in tiles]


def overlay(image: Image.Image, heat: np.ndarray, opacity: float = 0.8) -> Image.Image:
    """Lay a map [rows, columns] that covers an image over it, each cell as a rectangle of its pixels.

    Returns:
      An RGB image of the same size: unchanged where the map is 0 or less, coloured most where it is largest.
    """
    levels = Image.fromarray(np.uint8(np.clip(heat / max(np.max(heat), 1e-30), 0, 1) * 255))
    levels = levels.resize(image.size, Image.Resampling.NEAREST)
    colours = levels.copy()
    colours.putpalette(np.uint8(matplotlib.colormaps["plasma"](np.arange(256))[:, :3] * 255).tobytes())
    opacities = levels.point([round(level * opacity) for level in range(256)])
    return Image.composite(colours.convert("RGB"), to_rgb(image), opacities)
