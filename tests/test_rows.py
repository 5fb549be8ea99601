import dataclasses

import numpy as np
import pytest

from phivision_jax.batch import Batch, RowShape, batch_spec
from phivision_jax.config import DecoderConfig, ModelConfig, VisionConfig
from phivision_jax.images.layout import PatchedImage
from phivision_jax.rows import batch_from_ids, expand, fill_rows
from phivision_jax.text.constants import IGNORE

U, A = 7, 9  # a user's token, an assistant's
PAD = 99


CONFIG = ModelConfig(
    vision=VisionConfig(patch_size=2), min_patches=1, max_patches=16, decoder=DecoderConfig(pad_token_id=PAD)
)


def image(rows: int, columns: int, value: int = 1) -> PatchedImage:
    return PatchedImage(np.full((rows * columns, 12), value, np.uint8), ((rows, columns),))


def fill(rows, length=12, vision_rows=1, num_patches=4, image_attention="causal") -> Batch:
    return fill_rows(
        rows,
        RowShape(length, vision_rows, num_patches),
        dataclasses.replace(CONFIG, image_attention=image_attention),
    )


def test_fill_rows_as_in_docstring():
    first = expand([U, -200, A, A], [image(2, 2)], [IGNORE, IGNORE, A, A])
    second = expand([U, A, A], [], [IGNORE, A, A])
    batch = fill([[first, second]])
    assert batch.tokens[0].tolist() == [U, 0, 0, 0, 0, A, A, U, A, A, PAD, PAD]
    assert batch.segment_ids[0].tolist() == [1] * 7 + [2] * 3 + [0] * 2
    assert batch.positions[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 0, 0]
    assert batch.vision_index[0].tolist() == [-1, 0, 1, 2, 3] + [-1] * 7
    assert batch.loss_weights[0].tolist() == [0, 0, 0, 0, 1, 1, 0, 1, 1, 0, 0, 0]
    assert batch.targets[0].tolist() == [0, 0, 0, 0, A, A, 0, A, A, 0, 0, 0]
    assert batch.span_end[0].tolist() == list(range(12))
    assert batch.patch_coords[0, 0].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    both = fill([[first, second]], image_attention="bidirectional")
    assert both.span_end[0].tolist() == [0, 4, 4, 4, 4, 5, 6, 7, 8, 9, 10, 11]


def test_fill_rows_places_images_by_best_fit():
    # 3 patches leave 1 of 4 in row 0; 2 go to row 1; the next 1 fits both and takes the fuller row 0.
    example = expand([-200, -200, -200], [image(1, 3, 10), image(1, 2, 20), image(1, 1, 30)])
    batch = fill([[example]], vision_rows=2)
    assert batch.patch_segments[0].tolist() == [[1, 1, 1, 2], [1, 1, 0, 0]]
    assert batch.vision_index[0, :6].tolist() == [0, 1, 2, 4, 5, 3]
    assert batch.patches[0, :, :, 0].tolist() == [[10, 10, 10, 30], [20, 20, 0, 0]]
    with pytest.raises(ValueError, match="row 0: an image of 3 patches does not fit"):
        fill([[expand([-200, -200], [image(1, 3), image(1, 3)])]], vision_rows=1)


def test_fill_rows_rejects_long_row():
    with pytest.raises(ValueError, match="row 1: 13 tokens do not fit length 12"):
        fill([[], [expand([U] * 13, [])]])


def test_fill_rows_pads_empty_row():
    batch = fill([[]])
    assert batch.loss_weights.sum() == 0 and (batch.segment_ids == 0).all() and (batch.tokens == PAD).all()


@pytest.mark.parametrize(("ids", "images"), [([U, -200], []), ([U], [image(1, 1)]), ([-200, -200], [image(1, 1)])])
def test_expand_rejects_unmatched_markers(ids, images):
    with pytest.raises(ValueError, match=r"image markers \(-200\)"):
        expand(ids, images)


def test_expand_rejects_unmatched_labels():
    with pytest.raises(ValueError, match="3 ids but 2 labels"):
        expand([U, U, A], [], [IGNORE, A])


def test_patched_image_rejects_wrong_grid():
    with pytest.raises(ValueError, match="do not fill a grid of 2x2"):
        PatchedImage(np.zeros((3, 12), np.uint8), ((2, 2),))


def test_batch_from_ids_rejects_bad_input():
    with pytest.raises(ValueError, match="at least one example"):
        batch_from_ids([], config=CONFIG)
    with pytest.raises(ValueError, match="example 0: an example needs at least one id"):
        batch_from_ids([[], [1]], config=CONFIG)
    with pytest.raises(ValueError, match="patches are float32; give raw pixels as uint8"):
        PatchedImage(np.zeros((1, 768), np.float32), ((1, 1),))


def test_batch_from_ids_takes_arrays():
    batch = batch_from_ids(np.array([[1, 2], [3, 4]]), [None, []], config=CONFIG)
    assert batch.tokens.tolist() == [[1, 2], [3, 4]] and batch.loss_weights.sum() == 0


def test_batch_from_ids_takes_images_and_patches():
    from PIL import Image

    ready = PatchedImage(np.zeros((6, 12), np.uint8), ((2, 3),))
    batch = batch_from_ids([[1, -200, 2], [3, -200], [4]], [[Image.new("RGB", (4, 4))], [ready], []], config=CONFIG)
    assert batch.patch_grid[:, 0, 0].tolist() == [[2, 2], [2, 3], [1, 1]]
    assert batch.tokens.shape == (3, 7) and batch.patches.shape == (3, 1, 6, 12)
    assert batch.segment_ids.sum(1).tolist() == [6, 7, 1]
    with pytest.raises(ValueError, match="example 1: 1 image markers"):
        batch_from_ids([[1], [-200]], [[], []], config=CONFIG)


def test_batch_spec_matches_fill_rows():
    batch = fill([[]], vision_rows=2)
    spec = batch_spec(1, RowShape(12, 2, 4), 12)
    for name, filled, want in zip(Batch._fields, batch, spec, strict=True):
        assert (filled is None) == (want is None)
        if want is not None:
            assert (filled.shape, filled.dtype) == (want.shape, want.dtype), name
