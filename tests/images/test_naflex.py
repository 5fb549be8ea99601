"""NaFlex sizes and pixels against the released processor: arithmetic by hand, its size table, its pixels bitwise."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from phivision_jax.images.naflex import grid_of, grids_of, preprocess
from tests.support.pixels import normalize

GOLDEN = Path(__file__).parents[1] / "golden" / "pixels"


def scalar_grid(width: int, height: int, patch_size: int, min_patches: int, max_patches: int) -> list[int]:
    """The released processor's search, with one size and in Python's floats."""
    target = min(max((width // patch_size) * (height // patch_size), min_patches), max_patches)

    def grid_at(scale: float) -> list[int]:
        return [max(1, math.ceil(side * scale / patch_size)) for side in (height, width)]

    low, high = 1e-6, 100.0
    while high - low >= 1e-5:
        scale = (low + high) / 2
        low, high = (scale, high) if math.prod(grid_at(scale)) <= target else (low, scale)
    return grid_at(low)


@pytest.mark.parametrize(
    ("size", "target"),
    [
        ((1280, 720), (1280, 720)),
        ((1920, 1080), (1280, 720)),
        ((333, 500), (320, 496)),
        ((3000, 2000), (1168, 784)),
        ((4000, 300), (3424, 256)),
        ((961, 959), (960, 944)),
        ((16, 3000), (16, 3008)),  # 188 patches: the minimum is a target, not a floor
        ((100, 100), (256, 256)),
        ((4988, 3019), (1216, 736)),  # the search stops 1e-5 short of the scale at which 77 columns fit
        ((5915, 5438), (992, 912)),  # and at which 58 rows fit
        ((1, 1), (112, 112)),  # the search ends at a scale of 100
    ],
)
def test_grid_of_by_hand(size: tuple[int, int], target: tuple[int, int]) -> None:
    rows, columns = grid_of(*size)
    assert (columns * 16, rows * 16) == target


def test_grid_of_released_size_table() -> None:
    rows = json.loads((GOLDEN / "size_table.json").read_text())["rows"]
    assert len(rows) == 321
    for width, height, _, h, w, _, tiny_h, tiny_w in rows:
        assert grid_of(width, height) == (h, w), (width, height)
        assert grid_of(width, height, 16, 4, 64) == (tiny_h, tiny_w), (width, height)


@given(
    st.integers(1, 20_000), st.integers(1, 20_000), st.sampled_from([14, 16]), st.integers(1, 400), st.integers(0, 4000)
)
def test_grid_of_stays_within_target(width: int, height: int, patch: int, least: int, more: int) -> None:
    h, w = grid_of(width, height, patch, least, least + more)
    natural = (width // patch) * (height // patch)
    assert 1 <= h * w <= min(max(natural, least), least + more)
    assert grid_of(height, width, patch, least, least + more) == (w, h)


@pytest.mark.parametrize("bounds", [(16, 256, 3600), (14, 1, 400), (8, 4, 64)])
def test_grids_of_equals_the_released_search(bounds: tuple[int, int, int]) -> None:
    sizes = np.exp(np.random.default_rng(0).uniform(0, np.log(20_000), (3_000, 2))).astype(np.int32) + 1
    assert grids_of(sizes, *bounds).tolist() == [scalar_grid(w, h, *bounds) for w, h in sizes.tolist()]
    assert grids_of(np.zeros((0, 2), np.int32)).shape == (0, 2)


@pytest.mark.parametrize("size", [(0, 5), (5, 0)])
def test_grid_of_rejects_empty_image(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="no patches"):
        grid_of(*size)
    with pytest.raises(ValueError, match=f"{size[0]}x{size[1]} pixels has no patches"):
        grids_of(np.array([(3, 4), size]))


@pytest.mark.parametrize("name", ["noise_37x91", "chart_333x777", "gradient_400x30"])
def test_preprocess_matches_released_pixels(name: str) -> None:
    golden = np.load(GOLDEN / f"tiny_{name}.npz")
    with Image.open(GOLDEN / f"{name}.png") as image:
        patches, grid = preprocess(image, 16, 4, 64)
    assert patches.dtype == np.uint8
    assert grid == tuple(golden["spatial_shapes"][0])
    n = golden["pixel_attention_mask"].sum()
    expected = golden["pixel_values"][0, :n]
    np.testing.assert_array_equal(normalize(patches).view(np.int32), expected.view(np.int32))


def test_normalize_matches_released_values() -> None:
    ours = normalize(np.arange(256, dtype=np.uint8))
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours.view(np.int32), np.load(GOLDEN / "lut.npz")["lut"].view(np.int32))


def test_preprocess_patch_order_by_hand() -> None:
    """A 4x4 image of patches of 2: pixel (y, x) holds (10 y + x, 0, 255); nothing is resized."""
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[..., 0], pixels[..., 2] = 10 * np.arange(4)[:, None] + np.arange(4), 255
    patches, grid = preprocess(Image.fromarray(pixels), 2, 4, 4)
    assert grid == (2, 2)
    assert patches[:, 0::3].tolist() == [[0, 1, 10, 11], [2, 3, 12, 13], [20, 21, 30, 31], [22, 23, 32, 33]]
    assert patches[1].reshape(2, 2, 3)[1, 0].tolist() == [12, 0, 255]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "P", "1", "I;16", "CMYK"])
def test_preprocess_takes_every_mode(mode: str) -> None:
    image = Image.new(mode, (40, 20))
    patches, grid = preprocess(image, 16, 1, 16)
    assert patches.shape == (grid[0] * grid[1], 768)


def test_preprocess_copies_pixels() -> None:
    """No resizing, hence no copy of the pixels: the patches must not be a view of them, nor the other way round."""
    image = Image.effect_noise((64, 48), 60).convert("RGB")
    before = image.tobytes()
    patches, grid = preprocess(image, 16, 1, 12)
    assert grid == (3, 4)
    np.testing.assert_array_equal(patches[5], np.asarray(image)[16:32, 16:32].reshape(-1))
    patches[...] = 0
    assert image.tobytes() == before
