"""``Batch``, the contract between the host and the device, and the static shapes that it comes in.

The host half (images, text, data) builds batches of NumPy arrays without importing JAX; the device half (models,
training, inference) reads nothing else. A row holds several complete examples one after the other (packing):

    position       0  1  2  3  4  5  6  7  8  9 10 11
    tokens         u  ▢  ▢  ▢  ▢  a  a  u  a  a  ·  ·      u user  a answer  ▢ placeholder  · padding
    segment_ids    1  1  1  1  1  1  1  2  2  2  0  0
    positions      0  1  2  3  4  5  6  0  1  2  0  0
    vision_index  -1  0  1  2  3 -1 -1 -1 -1 -1 -1 -1      row 0 of ``patches`` holds a 2x2 image
    loss_weights   0  0  0  0  1  1  0  1  1  0  0  0      1 where the *target* is an answer token
    span_end       0  1  2  3  4  5  6  7  8  9 10 11      image_attention="causal": each position itself
    span_end       0  4  4  4  4  5  6  7  8  9 10 11      image_attention="bidirectional"
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, UInt8

# The types of a Batch's leaves: NumPy on the host, jax.Array on the device, ShapeDtypeStruct in a spec.
type Array = Any


class Batch(NamedTuple):
    """B rows of T text positions, each with R vision rows of P patches. All shapes are static over a run.

    ==============  =============  ===================================================================================
    tokens          i32 [B T]      token ids; 0 at vision tokens, whose embeddings are replaced
    targets         i32 [B T]      the next token of the example, which this position is to predict; 0 without a loss
    loss_weights    f32 [B T]      weight of that target in the loss; 0 at prompts, vision tokens and padding
    positions       i32 [B T]      position within the example, for RoPE
    segment_ids     i32 [B T]      0 for padding, 1… for the example within the row; an example is contiguous
    span_end        i32 [B T]      last position of the row that this query may attend to
    group_ids       i32 [B T]      mode × task of the example, for metrics
    vision_index    i32 [B T]      vision token (of the row's M) at this position, each used at most once; −1 for text
    patches         u8 [B R P d]   raw pixels of each patch, flattened (row, column, channel); normalized on the device
    patch_segments  i32 [B R P]    0 for padding, 1… for the tile within the vision row; a tile is contiguous and its
                                   patches attend to each other only. An image is one tile, unless its layout cuts it
    patch_coords    i32 [B R P 2]  row and column of the patch in its tile's grid
    patch_grid      i32 [B R P 2]  rows and columns of that grid (1, 1 for padding)
    merge_index     i32 [B M n k]  optional, like ``merge_weight`` (f32); see below
    ==============  =============  ===================================================================================

    Without merge tables vision token m of a row is patch m of its flattened [R·P] features. With them, vision token m
    is the concatenation over n of Σₖ weight[m,n,k] · feature[index[m,n,k]], where index −1 contributes zero.

    A named tuple, because JAX knows those as pytrees without being imported here.
    """

    tokens: Int32[Array, "B T"]
    targets: Int32[Array, "B T"]
    loss_weights: Float32[Array, "B T"]
    positions: Int32[Array, "B T"]
    segment_ids: Int32[Array, "B T"]
    span_end: Int32[Array, "B T"]
    group_ids: Int32[Array, "B T"]
    vision_index: Int32[Array, "B T"]
    patches: UInt8[Array, "B R P patch_dim"]
    patch_segments: Int32[Array, "B R P"]
    patch_coords: Int32[Array, "B R P 2"]
    patch_grid: Int32[Array, "B R P 2"]
    merge_index: Int32[Array, "B M n k"] | None = None
    merge_weight: Float32[Array, "B M n k"] | None = None


@dataclasses.dataclass(frozen=True)
class RowShape:
    """The static sizes of one row."""

    length: int
    """T: text positions, image tokens included."""
    vision_rows: int = 1
    """R."""
    num_patches: int = 0
    """P of each vision row; an image is within one."""
    merge: tuple[int, int, int] | None = None
    """(M, n, k) of the merge tables; None where every patch is a vision token."""

    def __post_init__(self) -> None:
        if self.length < 1 or self.vision_rows < 1 or self.num_patches < 0:
            raise ValueError(f"a row needs length >= 1, vision_rows >= 1 and num_patches >= 0, not {self}")

    @property
    def total_patches(self) -> int:
        """R · P."""
        return self.vision_rows * self.num_patches

    def arrays(self, rows: int, patch_dim: int) -> dict[str, tuple[tuple[int, ...], type[np.generic]]]:
        """Shape and dtype of each field of a ``Batch`` of that many rows."""
        text, vision = (rows, self.length), (rows, self.vision_rows, self.num_patches)
        names = ("tokens", "targets", "positions", "segment_ids", "span_end", "group_ids", "vision_index")
        arrays: dict[str, tuple[tuple[int, ...], type[np.generic]]] = {
            **dict.fromkeys(names, (text, np.int32)),
            "loss_weights": (text, np.float32),
            "patches": ((*vision, patch_dim), np.uint8),
            "patch_segments": (vision, np.int32),
            "patch_coords": ((*vision, 2), np.int32),
            "patch_grid": ((*vision, 2), np.int32),
        }
        if self.merge:
            tables = (rows, *self.merge)
            arrays |= {"merge_index": (tables, np.int32), "merge_weight": (tables, np.float32)}
        return arrays


def batch_spec(rows: int, shape: RowShape, patch_dim: int = 768) -> Batch:
    """A ``Batch`` of ``jax.ShapeDtypeStruct``, which a step is compiled for."""
    import jax

    return Batch(**{name: jax.ShapeDtypeStruct(*leaf) for name, leaf in shape.arrays(rows, patch_dim).items()})
