"""The contract between host and device: ``Batch``, its shapes, and how examples fill it.

Left of ``Batch`` everything is NumPy and knows no model; right of it everything is JAX and opens no file.
One row holds whole examples side by side; an image is never cut.

    column         0  1  2  3  4  5  6  7  8  9 10 11
    tokens         u  ▢  ▢  ▢  ▢  a  a  u  a  a  ·  ·      u user  a answer  ▢ placeholder  · padding
    segment_ids    1  1  1  1  1  1  1  2  2  2  0  0
    positions      0  1  2  3  4  5  6  0  1  2  0  0
    vision_index  -1  0  1  2  3 -1 -1 -1 -1 -1 -1 -1      row 0 of ``patches`` holds a 2x2 image
    loss_weights   0  0  0  0  1  1  0  1  1  0  0  0      a column is weighed where its *target* is an answer token
    span_end       0  1  2  3  4  5  6  7  8  9 10 11      causal: its own column
    span_end       0  4  4  4  4  5  6  7  8  9 10 11      image_attention="bidirectional"
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Float32, Int32, UInt8

from phivision_jax.text.constants import IGNORE, IMAGE_TOKEN, PLACEHOLDER

if TYPE_CHECKING:
    from PIL.Image import Image

    from phivision_jax.config import ImageAttention, ModelConfig

# The types of a Batch's leaves: NumPy on the host, jax.Array on the device, ShapeDtypeStruct in a spec.
type Array = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """B rows of T text columns, each with R vision rows of P patches. All shapes are static over a run.

    ``merge_index`` and ``merge_weight`` are optional and come together. Absent means identity: vision token m of a row
    is patch m of its flattened [R·P] features. Present, vision token m is the concatenation over g of
    Σₖ weight[m,g,k] · feature[index[m,g,k]], where index −1 contributes zero.
    """

    tokens: Int32[Array, "B T"]
    targets: Int32[Array, "B T"]
    loss_weights: Float32[Array, "B T"]
    positions: Int32[Array, "B T"]
    segment_ids: Int32[Array, "B T"]
    """0 padding, 1… the example within the row, which is one run of columns."""
    span_end: Int32[Array, "B T"]
    """The last column of the row that this query may see."""
    group_ids: Int32[Array, "B T"]
    """Mode × task of the example, for metrics."""
    vision_index: Int32[Array, "B T"]
    """Which of the row's M vision tokens lands here; −1 for text. A token lands in one column at most."""
    patches: UInt8[Array, "B R P patch_dim"]
    """Raw pixels, flattened (row, column, channel); normalised on the device."""
    patch_segments: Int32[Array, "B R P"]
    """0 padding, 1… the image (or tile) within the vision row, one run of patches: attention never crosses it."""
    patch_coords: Int32[Array, "B R P 2"]
    """Row and column of the patch in its image's grid."""
    patch_grid: Int32[Array, "B R P 2"]
    """Rows and columns of that grid (1, 1 for padding)."""
    merge_index: Int32[Array, "B M G K"] | None = None
    merge_weight: Float32[Array, "B M G K"] | None = None

    @classmethod
    def from_ids(
        cls,
        ids: Sequence[Sequence[int]],
        images: Sequence[Sequence[Image | tuple[np.ndarray, tuple[int, int]]]] | None = None,
        labels: Sequence[Sequence[int]] | None = None,
        *,
        config: ModelConfig | None = None,
        length: int | None = None,
        num_patches: int | None = None,
    ) -> Batch:
        """Lay out one example per row, without a tokenizer.

        Args:
          ids: per example, token ids with −200 (``IMAGE_TOKEN``) where an image stands.
          images: per example, its images in order: PIL images, or ready ``(patches [n, patch²·3] u8, (h, w))`` pairs.
          labels: per example, one label per id, −100 (``IGNORE``) where the loss is not to look; default: no loss.
          config: patch size, patch range and mask mode; default: the released model's.
          length: T; default: the longest example.
          num_patches: P (R is 1); default: the most patches of any example.

        Raises:
          ValueError: when markers and images do not match, or an example does not fit.
        """
        from phivision_jax.config import ModelConfig
        from phivision_jax.images.naflex import preprocess

        # Any vocabulary has token 0; the released padding id is beyond a small one's end.
        pad_token_id = config.decoder.pad_token_id if config else PLACEHOLDER
        config = config or ModelConfig()
        if len(ids) == 0:
            raise ValueError("a batch needs at least one row of ids")
        images = images if images is not None else [[] for _ in ids]
        labels = labels if labels is not None else [[IGNORE] * len(row) for row in ids]
        if not len(ids) == len(images) == len(labels):
            raise ValueError(f"{len(ids)} rows of ids, {len(images)} of images, {len(labels)} of labels: need one each")

        def ready(image: Image | tuple[np.ndarray, tuple[int, int]]) -> PatchedImage:
            if isinstance(image, tuple | list):
                patches, (rows, columns) = image
                return PatchedImage(np.asarray(patches), (int(rows), int(columns)))
            return PatchedImage(*preprocess(image, config.vision.patch_size, config.min_patches, config.max_patches))

        examples = []
        for i, (row_ids, row_images, row_labels) in enumerate(zip(ids, images, labels, strict=True)):
            try:
                examples.append(expand(row_ids, [ready(image) for image in row_images or ()], row_labels))
            except ValueError as error:
                raise ValueError(f"example {i}: {error}") from None
        return fill_rows(
            [[example] for example in examples],
            length=max(len(e.tokens) for e in examples) if length is None else length,
            vision_rows=1,
            num_patches=max(e.num_patches for e in examples) if num_patches is None else num_patches,
            patch_dim=config.vision.patch_dim,
            image_attention=config.image_attention,
            pad_token_id=pad_token_id,
        )


def batch_spec(
    *,
    rows: int,
    length: int,
    vision_rows: int,
    num_patches: int,
    patch_dim: int = 768,
    merge: tuple[int, int, int] | None = None,
) -> Batch:
    """A Batch of ``jax.ShapeDtypeStruct``: what a step is compiled for. ``merge`` is (M, G, K)."""

    def i32(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, np.int32)

    text, vision = (rows, length), (rows, vision_rows, num_patches)
    return Batch(
        tokens=i32(*text),
        targets=i32(*text),
        loss_weights=jax.ShapeDtypeStruct(text, np.float32),
        positions=i32(*text),
        segment_ids=i32(*text),
        span_end=i32(*text),
        group_ids=i32(*text),
        vision_index=i32(*text),
        patches=jax.ShapeDtypeStruct((*vision, patch_dim), np.uint8),
        patch_segments=i32(*vision),
        patch_coords=i32(*vision, 2),
        patch_grid=i32(*vision, 2),
        merge_index=i32(rows, *merge) if merge else None,
        merge_weight=jax.ShapeDtypeStruct((rows, *merge), np.float32) if merge else None,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Examples and how they fill rows (NumPy).


@dataclasses.dataclass(frozen=True)
class PatchedImage:
    """One image as the encoder takes it."""

    patches: np.ndarray
    """[n, patch²·3] u8, row-major over the grid."""
    grid: tuple[int, int]
    """Rows and columns of patches; n is their product."""

    def __post_init__(self) -> None:
        if self.patches.ndim != 2 or len(self.patches) != self.grid[0] * self.grid[1]:
            raise ValueError(f"patches {self.patches.shape} do not fill a grid of {self.grid[0]}x{self.grid[1]}")
        if self.patches.dtype != np.uint8:
            raise ValueError(f"patches are {self.patches.dtype}; give raw pixels as uint8, the model normalises them")


@dataclasses.dataclass(frozen=True)
class Example:
    """One encoded conversation, image columns laid out."""

    tokens: np.ndarray
    """[t] i32; ``PLACEHOLDER`` at image columns."""
    labels: np.ndarray
    """[t] i32, not shifted; ``IGNORE`` where the loss does not look."""
    image_starts: tuple[int, ...] = ()
    """The column at which each image begins; it covers as many columns as it has patches."""
    images: tuple[PatchedImage, ...] = ()
    group: int = 0

    @property
    def num_patches(self) -> int:
        return sum(len(image.patches) for image in self.images)


def expand(
    ids: Sequence[int], images: Sequence[PatchedImage], labels: Sequence[int] | None = None, group: int = 0
) -> Example:
    """Replace each −200 in ``ids`` by as many columns as its image has patches.

    Raises:
      ValueError: when there are no ids, the number of markers is not the number of images, or labels and ids differ in
        length.
    """
    given = np.asarray(ids, np.int32).reshape(-1)
    given_labels = np.full_like(given, IGNORE) if labels is None else np.asarray(labels, np.int32).reshape(-1)
    if len(given) == 0:
        raise ValueError("an example needs at least one id")
    if given.shape != given_labels.shape:
        raise ValueError(f"{len(given)} ids but {len(given_labels)} labels")
    markers = np.flatnonzero(given == IMAGE_TOKEN)
    if len(markers) != len(images):
        raise ValueError(f"{len(markers)} image markers ({IMAGE_TOKEN}) but {len(images)} images")
    repeats = np.ones(len(given), np.int64)
    repeats[markers] = [len(image.patches) for image in images]
    starts = np.concatenate([[0], np.cumsum(repeats)])[markers]
    tokens, expanded_labels = np.repeat(given, repeats), np.repeat(given_labels, repeats)
    at_image = tokens == IMAGE_TOKEN
    tokens[at_image], expanded_labels[at_image] = PLACEHOLDER, IGNORE
    return Example(tokens, expanded_labels, tuple(int(s) for s in starts), tuple(images), group)


def fill_rows(
    rows: Sequence[Sequence[Example]],
    *,
    length: int,
    vision_rows: int,
    num_patches: int,
    patch_dim: int,
    image_attention: ImageAttention,
    pad_token_id: int,
) -> Batch:
    """Lay out examples side by side, row by row. An empty row is all padding.

    Raises:
      ValueError: when a row's examples exceed ``length`` columns or its images do not fit ``vision_rows`` rows of
        ``num_patches``, naming the row and the numbers.
    """
    spec = batch_spec(
        rows=len(rows), length=length, vision_rows=vision_rows, num_patches=num_patches, patch_dim=patch_dim
    )
    batch = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), spec)
    batch.tokens[...] = pad_token_id
    batch.span_end[...] = np.arange(length, dtype=np.int32)
    batch.vision_index[...] = -1
    batch.patch_grid[...] = 1
    for b, examples in enumerate(rows):
        column, used, images_in_row = 0, [0] * vision_rows, [0] * vision_rows
        for segment, example in enumerate(examples, start=1):
            n = len(example.tokens)
            if column + n > length:
                raise ValueError(f"row {b}: {column + n} columns do not fit length {length}")
            at = slice(column, column + n)
            batch.tokens[b, at] = example.tokens
            batch.positions[b, at] = np.arange(n)
            batch.segment_ids[b, at] = segment
            batch.group_ids[b, at] = example.group
            seen = example.labels[1:] != IGNORE
            batch.targets[b, column : column + n - 1] = np.where(seen, example.labels[1:], 0)
            batch.loss_weights[b, column : column + n - 1] = seen
            for start, image in zip(example.image_starts, example.images, strict=True):
                k = len(image.patches)
                r = fullest_vision_row(used, k, num_patches)
                if r is None:
                    raise ValueError(f"row {b}: an image of {k} patches does not fit ({used} of {num_patches} used)")
                images_in_row[r] += 1
                p = slice(used[r], used[r] + k)
                batch.patches[b, r, p] = image.patches
                batch.patch_segments[b, r, p] = images_in_row[r]
                batch.patch_coords[b, r, p] = np.indices(image.grid).reshape(2, -1).T
                batch.patch_grid[b, r, p] = image.grid
                columns = slice(column + start, column + start + k)
                batch.vision_index[b, columns] = r * num_patches + np.arange(used[r], used[r] + k)
                if image_attention == "bidirectional":
                    batch.span_end[b, columns] = columns.stop - 1
                used[r] += k
            column += n
    return batch


def fullest_vision_row(used: Sequence[int], need: int, capacity: int) -> int | None:
    """Best fit: the vision row with the least room left that still takes ``need`` patches."""
    fitting = [r for r, u in enumerate(used) if u + need <= capacity]
    return max(fitting, key=lambda r: used[r]) if fitting else None
