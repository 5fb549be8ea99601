"""The tiled strategies against PyTorch's golden arrays, tables computed by hand, and properties of every tiling."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from benchmarks import strategy_tokens
from benchmarks.tables import fill
from phivision_jax.config import ModelConfig, ProjectorConfig, VisionConfig
from phivision_jax.images.layout import ImageLayout, make_layout, with_layout

HERE = Path(__file__).parent
GOLDEN = HERE.parent / "golden"
TILED = ("multicrop", "s2", "multicrop_s2", "dynamic_s2")
SIZES = st.tuples(st.integers(1, 9000), st.integers(1, 9000))


@functools.cache
def layout_of(name: str, patch: int = 16, tile: int = 384, cap: int | None = None) -> ImageLayout:
    config = ModelConfig(vision=VisionConfig(patch_size=patch), tile_size=tile)
    return make_layout(with_layout(config, f"{name}:{cap}" if cap else name))


# ---------------------------------------------------------------------------------------------------------------------
# Published algorithms.


@pytest.mark.parametrize(
    "case, tile, cap",
    [
        ("s2", 16, None),
        ("multicrop_s2", 16, 48),
        ("dynamic_s2", 16, 40),
        ("dynamic_s2_odd", 12, 25),
        ("multicrop", 20, 160),
    ],
)
def test_tokens_equal_published_algorithm(case, tile, cap):
    """Tiles and, from the same features, tokens of ``tests/golden/make_strategies.py``."""
    golden = np.load(GOLDEN / "cases/strategies.npz")
    layout = layout_of(case.removesuffix("_odd"), patch=4, tile=tile, cap=cap)
    encoded = layout.encode(Image.open(GOLDEN / "pixels/chart_333x777.png"))
    patches = np.stack(encoded.tiles).reshape(-1, tile // 4, tile // 4, 4, 4, 3)
    pixels = patches.transpose(0, 1, 3, 2, 4, 5).reshape(-1, tile, tile, 3).astype(int)
    assert np.abs(pixels - golden[f"{case}_tiles"]).max() <= 1  # the edges of boxes are rounded to f32
    index, weight = encoded.merge_index, encoded.merge_weight
    weighted = golden[f"{case}_features"][index] * np.where(index < 0, 0, weight)[..., None]
    tokens = weighted.sum(axis=2).reshape(len(index), -1)
    np.testing.assert_allclose(tokens, golden[f"{case}_tokens"], atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Tables by hand.


def rows_by_hand() -> list[list[str]]:
    lines = (HERE / "strategy_grids.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if re.match(r"\| \d", line)]
    assert len(cells) == 30
    return cells


@pytest.mark.parametrize("row", rows_by_hand(), ids=lambda row: row[0])
def test_grids_equal_table_by_hand(row):
    size, *expected = row
    width, height = map(int, size.split("x"))
    found = []
    for name in ("multicrop", "multicrop_s2", "dynamic_s2"):
        layout = layout_of(name)
        tiling = layout.tiling(width, height)
        rows, columns = tiling.scales[-1] if name == "dynamic_s2" else tiling.crops
        canvas = "x".join(map(str, tiling.canvas))
        found.append(f"{canvas} {columns}x{rows} {layout.measure(width, height).tokens}")
    assert found == expected


@pytest.mark.parametrize("name", TILED)
def test_tokens_per_tile_of_patch_14(name):
    """27x27 features: 729 per tile; 14x14 tokens where 2x2 features are joined, the last row and column half empty."""
    layout = layout_of(name, patch=14, tile=378)
    expected = {"multicrop": 729, "s2": 729, "multicrop_s2": 729, "dynamic_s2": 14 * 14}
    assert layout.measure(300, 300).tokens == expected[name]


def test_committed_tokens_are_current():
    """The numbers of ``benchmarks/strategy_tokens.py``, and the table in the documentation that is made of them."""
    committed = json.loads(strategy_tokens.RESULT.read_text())
    assert committed == json.loads(json.dumps(strategy_tokens.measure()))
    page = strategy_tokens.PAGE.read_text()
    assert page == fill(page, "strategy tokens", strategy_tokens.table(committed))


# ---------------------------------------------------------------------------------------------------------------------
# Properties.


@pytest.mark.parametrize("patch, tile", [(16, 384), (14, 378)])
@pytest.mark.parametrize("name", TILED)
@example(size=(1, 1920))
@given(size=SIZES)
def test_every_pixel_is_covered_within_limits(name, patch, tile, size):
    layout = layout_of(name, patch, tile)
    measured, tiling, boxes = layout.measure(*size), layout.tiling(*size), layout.boxes(*size)
    assert 0 < measured.tokens <= layout.cap and measured.patches <= layout.max_patches
    assert len(boxes) == len(measured.grids) == tiling.num_crops * tiling.tiles_per_crop
    per_crop = [boxes[i : i + tiling.tiles_per_crop] for i in range(0, len(boxes), tiling.tiles_per_crop)]
    first = 0
    for rows, columns in tiling.scales:
        # At each scale, the boxes of all crops together cover the image: in both directions, as crops form a grid.
        crops = [crop[first : first + rows * columns] for crop in per_crop]
        scale = [box for crop in crops for box in crop]
        first += rows * columns
        for axis, side in enumerate(size):
            reached = 0.0
            for low, high in sorted({(box[axis], box[axis + 2]) for box in scale}):
                assert low <= reached
                reached = max(reached, high)
            assert reached == side
        # Tiles of different crops may coincide where the crops overlap by a multiple of a tile.
        assert all(len({box[:2] for box in crop}) == rows * columns for crop in crops)
    origins = [(crop[0][1], crop[0][0]) for crop in per_crop]
    assert origins == sorted(set(origins))  # row by row


@pytest.mark.parametrize("name", TILED)
@given(size=st.tuples(st.integers(1, 200), st.integers(1, 200)), limit=st.integers(1, 2000))
def test_encode_has_the_measured_size(name, size, limit):
    layout = layout_of(name, patch=4, tile=16)
    image = Image.new("RGB", size, "red")
    encoded, measured = layout.encode(image, limit), layout.measure(*size, limit)
    assert encoded.size == measured and measured.patches <= max(limit, layout.measure(1, 1).patches)
    assert (encoded.patches.reshape(-1, 3) == (255, 0, 0)).all()
    index, weight = encoded.merge_index, encoded.merge_weight
    assert index.shape == weight.shape == (measured.tokens, *layout.merge)
    assert set(np.unique(index[index >= 0])) == set(range(measured.patches))  # no feature is left out
    sums = np.where(index < 0, 0, weight).sum(axis=-1)
    np.testing.assert_allclose(sums[index.max(-1) >= 0], 1, rtol=1e-6)


@pytest.mark.parametrize("name", TILED)
def test_tokens_are_in_reading_order(name):
    """Features that are the position of their patch on the image: tokens go along rows of a crop, then down.

    Read from the finest scale, which is the first feature of a token that has one of its own.
    """
    layout = layout_of(name, patch=4, tile=16)
    encoded, width, height = layout.encode(Image.new("RGB", (150, 90))), 150, 90
    centres = []
    for left, top, right, bottom in layout.boxes(width, height):
        middles = (np.arange(4) + 0.5) / 4
        y, x = np.meshgrid(top + middles * (bottom - top), left + middles * (right - left), indexing="ij")
        centres.append(np.stack([y, x], axis=-1).reshape(-1, 2))
    tiling = layout.tiling(width, height)
    finest = len(tiling.scales) - 1
    positions = np.concatenate(centres)[encoded.merge_index[:, finest]] * encoded.merge_weight[:, finest, :, None]
    tokens, per_crop = positions.sum(axis=1), encoded.size.tokens // tiling.num_crops
    for crop in tokens[:per_crop], tokens[-per_crop:]:
        rounded = [tuple(position) for position in crop.round(3).tolist()]
        assert rounded == sorted(rounded) and len(set(rounded)) == len(rounded)


def test_equal_images_give_equal_bytes():
    image = Image.open(GOLDEN / "pixels/chart_333x777.png")
    for name in TILED:
        first, second = layout_of(name).encode(image), layout_of(name).encode(image)
        for field in ("patches", "merge_index", "merge_weight"):
            assert getattr(first, field).tobytes() == getattr(second, field).tobytes()


# ---------------------------------------------------------------------------------------------------------------------
# Configurations.


def test_with_layout_sets_what_follows():
    configs = {name: with_layout(ModelConfig(), name) for name in ("naflex:2048", *TILED)}
    assert {name: (c.projector.merge_size, c.max_patches) for name, c in configs.items()} == {
        "naflex:2048": (1, 2048),
        "multicrop": (1, 21 * 576),
        "s2": (3, 14 * 576),
        "multicrop_s2": (3, 3 * 21 * 576),
        "dynamic_s2": (12, (5 + 21) * 576),
    }
    assert with_layout(configs["dynamic_s2"], "naflex:2048") == configs["naflex:2048"]


@pytest.mark.parametrize(
    "settings, problem",
    [
        ({"projector": ProjectorConfig(4)}, "concatenates 12 features into a token, but projector.merge_size is 4"),
        ({"vision": VisionConfig(patch_size=14)}, "384 is no multiple of vision.patch_size 14, .* set tile_size=378"),
        ({"max_patches": 3000}, "needs 3,456 for its smallest image, and max_patches is 3,000"),
        ({"max_image_tokens": 100}, "needs 144 for its smallest image, and max_image_tokens is 100"),
        ({"image_layout": "naflex", "max_image_tokens": 9}, "set max_patches, not max_image_tokens"),
    ],
)
def test_wrong_combinations_are_refused(settings, problem):
    with pytest.raises(ValueError, match=problem):
        make_layout(dataclasses.replace(with_layout(ModelConfig(), "dynamic_s2"), **settings))


@pytest.mark.parametrize("strategy, problem", [("dynamics2", "did you mean 'dynamic_s2'"), ("s2:many", "'many'")])
def test_with_layout_refuses(strategy, problem):
    with pytest.raises(ValueError, match=problem):
        with_layout(ModelConfig(), strategy)


def test_fingerprint_has_every_setting():
    settings = [("multicrop", 16, 384, None), ("s2", 16, 384, None), ("multicrop", 8, 384, None)]
    settings += [("multicrop", 16, 320, None), ("multicrop", 16, 384, 2000)]
    assert len({str(layout_of(*each).fingerprint) for each in settings}) == len(settings)
