"""Examples, and how they fill the rows of a ``Batch``: NumPy only.

An example's image markers are expanded into placeholders, one per vision token. Several examples then go into one row,
each with its images in the row's vision rows; an image is never split.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
from PIL.Image import Image

from phivision_jax.batch import Batch, RowShape
from phivision_jax.config import ModelConfig
from phivision_jax.images.layout import PatchedImage, make_layout
from phivision_jax.io.messages import prefix_errors
from phivision_jax.text.constants import IGNORE, IMAGE_TOKEN, PLACEHOLDER


@dataclasses.dataclass(frozen=True)
class Example:
    """One encoded conversation, its image markers expanded."""

    tokens: np.ndarray
    """[t] i32; ``PLACEHOLDER`` at image tokens."""
    labels: np.ndarray
    """[t] i32, not shifted; ``IGNORE`` where there is no loss."""
    image_starts: tuple[int, ...] = ()
    """The position of each image's first token."""
    images: tuple[PatchedImage, ...] = ()
    group: int = 0

    @property
    def num_patches(self) -> int:
        return sum(len(image.patches) for image in self.images)

    @property
    def text_tokens(self) -> int:
        """Tokens that are not of an image."""
        return len(self.tokens) - sum(image.size.tokens for image in self.images)


def expand(
    ids: Sequence[int] | np.ndarray,
    images: Sequence[PatchedImage],
    labels: Sequence[int] | None = None,
    group: int = 0,
) -> Example:
    """Replace each −200 in ``ids`` by the tokens of its image.

    Raises:
      ValueError: when there are no ids, the number of markers is not the number of images, or labels and ids differ in
        length.
    """
    given = np.asarray(ids, np.int32).reshape(-1)
    if len(given) == 0:
        raise ValueError("an example needs at least one id")
    given_labels = None if labels is None else np.asarray(labels, np.int32).reshape(-1)
    if given_labels is not None and given.shape != given_labels.shape:
        raise ValueError(f"{len(given)} ids but {len(given_labels)} labels")
    markers = np.flatnonzero(given == IMAGE_TOKEN).tolist()
    if len(markers) != len(images):
        raise ValueError(f"{len(markers)} image markers ({IMAGE_TOKEN}) but {len(images)} images")
    sizes = [image.size.tokens for image in images]
    length = len(given) - len(markers) + sum(sizes)
    tokens, expanded_labels = np.full(length, PLACEHOLDER, np.int32), np.full(length, IGNORE, np.int32)
    starts = []
    first, position = 0, 0  # of the text before the next image, in ``given`` and in ``tokens``
    for marker, size in zip([*markers, len(given)], [*sizes, 0], strict=True):
        text = slice(position, position + marker - first)
        tokens[text] = given[first:marker]
        if given_labels is not None:
            expanded_labels[text] = given_labels[first:marker]
        starts.append(text.stop)
        first, position = marker + 1, text.stop + size
    return Example(tokens, expanded_labels, tuple(starts[:-1]), tuple(images), group)


def fill_rows(rows: Sequence[Sequence[Example]], shape: RowShape, config: ModelConfig) -> Batch:
    """Lay out examples side by side, row by row. An empty row is all padding.

    Args:
      rows: the examples of each row.
      shape: of every row.
      config: patch size, mask mode and padding id.

    Raises:
      ValueError: when a row's examples exceed its length or its images do not fit its vision rows, naming the row and
        the numbers.
    """
    arrays = shape.arrays(len(rows), config.vision.patch_dim)
    batch = Batch(**{name: np.zeros(*leaf) for name, leaf in arrays.items()})
    batch.tokens[...] = config.decoder.pad_token_id or 0
    batch.span_end[...] = np.arange(shape.length, dtype=np.int32)
    batch.vision_index[...] = -1
    batch.patch_grid[...] = 1
    if batch.merge_index is not None:
        batch.merge_index[...] = -1
    for b, examples in enumerate(rows):
        with prefix_errors(f"row {b}"):
            _fill_row(Batch(*(array if array is None else array[b] for array in batch)), examples, shape, config)
    return batch


def _fill_row(row: Batch, examples: Sequence[Example], shape: RowShape, config: ModelConfig) -> None:
    """Write examples into one row of a batch; its arrays have no B axis and hold padding."""
    position, merged = 0, 0
    used, tiles = [0] * shape.vision_rows, [0] * shape.vision_rows
    for segment, example in enumerate(examples, start=1):
        n = len(example.tokens)
        if position + n > shape.length:
            raise ValueError(f"{position + n} tokens do not fit length {shape.length}")
        span = slice(position, position + n)
        row.tokens[span] = example.tokens
        row.positions[span] = np.arange(n)
        row.segment_ids[span] = segment
        row.group_ids[span] = example.group
        labels = example.labels[1:]
        row.targets[position : position + n - 1] = np.where(labels != IGNORE, labels, 0)
        row.loss_weights[position : position + n - 1] = labels != IGNORE
        for start, image in zip(example.image_starts, example.images, strict=True):
            patches, tokens = len(image.patches), image.size.tokens
            r = fullest_vision_row(used, patches, shape.num_patches)
            if r is None:
                raise ValueError(f"an image of {patches} patches does not fit ({used} of {shape.num_patches} used)")
            first = r * shape.num_patches + used[r]  # its first patch in the flattened [R·P]
            row.patches[r, used[r] : used[r] + patches] = image.patches
            for grid in image.grids:
                tile = slice(used[r], used[r] + grid[0] * grid[1])
                tiles[r] += 1
                row.patch_segments[r, tile] = tiles[r]
                row.patch_coords[r, tile] = np.indices(grid).reshape(2, -1).T
                row.patch_grid[r, tile] = grid
                used[r] = tile.stop
            if shape.merge:
                _fill_merge_tables(row, image, slice(merged, merged + tokens), first)
                first, merged = merged, merged + tokens
            span = slice(position + start, position + start + tokens)
            row.vision_index[span] = np.arange(first, first + tokens)
            if config.image_attention == "bidirectional":
                row.span_end[span] = span.stop - 1
        position += n


def _fill_merge_tables(row: Batch, image: PatchedImage, tokens: slice, first_patch: int) -> None:
    """Write an image's merge tables at these vision tokens of a row."""
    index, weight = image.merge_index, image.merge_weight
    if index is None or row.merge_index is None or row.merge_weight is None:
        raise ValueError("an image without merge tables in rows that have them: its layout is not the model's")
    if tokens.stop > len(row.merge_index):
        raise ValueError(f"{tokens.stop} vision tokens do not fit merge tables of {len(row.merge_index)}")
    row.merge_index[tokens] = np.where(index < 0, -1, index + first_patch)
    row.merge_weight[tokens] = weight


def row_shape(config: ModelConfig, length: int, vision_rows: int = 1, num_patches: int = 0) -> RowShape:
    """The shape of rows of this many text positions and patches, with the merge tables of a model's image layout."""
    layout = make_layout(config)
    # A vision token takes a position, so a row never has more than T of them.
    merge = layout.merge and (min(length, layout.max_tokens(vision_rows * num_patches)), *layout.merge)
    return RowShape(length, vision_rows, num_patches, merge)


def fullest_vision_row(used: Sequence[int], need: int, capacity: int) -> int | None:
    """Best fit: the vision row with the least room left that still takes ``need`` patches."""
    fitting = [r for r, u in enumerate(used) if u + need <= capacity]
    return max(fitting, key=lambda r: used[r]) if fitting else None


def one_per_row(
    examples: Sequence[Example],
    config: ModelConfig,
    *,
    length: int | None = None,
    num_patches: int | None = None,
    multiple: int = 1,
) -> Batch:
    """A ``Batch`` of one example per row, with one vision row each.

    Args:
      length: T; default: the longest example.
      num_patches: P; default: the most patches of any example.
      multiple: rounds those defaults up to a multiple of this, so that few shapes are ever compiled.
    """
    if not examples:
        raise ValueError("a batch needs at least one example")

    def most(sizes: Iterable[int]) -> int:
        return -(-max(sizes) // multiple) * multiple

    length = most(len(example.tokens) for example in examples) if length is None else length
    num_patches = most(example.num_patches for example in examples) if num_patches is None else num_patches
    return fill_rows([[example] for example in examples], row_shape(config, length, 1, num_patches), config)


def batch_from_ids(
    ids: Sequence[Sequence[int]],
    images: Sequence[Sequence[Image | PatchedImage]] | None = None,
    labels: Sequence[Sequence[int]] | None = None,
    *,
    config: ModelConfig,
    length: int | None = None,
    num_patches: int | None = None,
) -> Batch:
    """A ``Batch`` of one example per row, made without a tokenizer.

    Args:
      ids: per example, token ids with −200 (``IMAGE_TOKEN``) for each image.
      images: per example, its images in order.
      labels: per example, one label per id, −100 (``IGNORE``) where there is no loss; default: no loss.
      config: patch size, patch range, mask mode and padding id.
      length, num_patches: as in ``one_per_row``.

    Raises:
      ValueError: when markers and images do not match, or an example does not fit.
    """
    images = images if images is not None else [[] for _ in ids]
    labels = labels if labels is not None else [[IGNORE] * len(row) for row in ids]
    if not len(ids) == len(images) == len(labels):
        raise ValueError(f"{len(ids)} rows of ids, {len(images)} of images, {len(labels)} of labels: need one each")
    layout = make_layout(config)
    examples = []
    for i, (row_ids, row_images, row_labels) in enumerate(zip(ids, images, labels, strict=True)):
        with prefix_errors(f"example {i}"):
            patched = [image if isinstance(image, PatchedImage) else layout.encode(image) for image in row_images or ()]
            examples.append(expand(row_ids, patched, row_labels))
    return one_per_row(examples, config, length=length, num_patches=num_patches)
