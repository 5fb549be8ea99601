"""Figures of image layouts, and the numbers in them."""

from __future__ import annotations

import dataclasses

import pytest
from PIL import Image

from phivision_jax.data.view.strategies import Cost, _busiest, _scales, comparison, layout_figure
from phivision_jax.images.layout import make_layout, with_layout
from tests.support.records import CONFIG

TILED = dataclasses.replace(CONFIG, tile_size=16)


def test_cost_by_hand():
    """100x40 pixels as 5x2 tiles of 16: 80x32 pixels of aspect ratio 2.5; 2x2 patches are one token."""
    cost = Cost.measure(make_layout(with_layout(TILED, "dynamic_s2:10")), 100, 40)
    assert cost == Cost(tokens=10, patches=(5 + 10) * 4, tiles=15, resized=(80, 32), stretch=1.0, pixels_per_token=400)
    text = str(cost)
    assert "10 tokens, 60 patches in 15 tiles" in text and "not distorted" in text and "(20×20 of the image)" in text
    assert "stretched by 150.0%" in str(Cost.measure(make_layout(with_layout(TILED, "s2")), 100, 40))


@pytest.mark.parametrize("strategy, counts", [("naflex", [1]), ("multicrop:16", [6]), ("dynamic_s2:10", [10, 4, 1])])
def test_tiles_are_grouped_by_scale(strategy, counts):
    layout = make_layout(with_layout(TILED, strategy))
    size = (100, 40) if strategy.startswith("dynamic") else (48, 32)
    assert [len(boxes) for boxes in _scales(layout, *size)] == counts


def test_detail_is_where_the_contrast_is():
    image = Image.new("RGB", (120, 60))
    image.paste("white", (85, 25, 90, 30))
    left, top, right, bottom = _busiest(image)
    assert left <= 85 and right >= 90 and top <= 25 and bottom >= 30 and right - left == bottom - top == 20


@pytest.mark.parametrize("size", [(60, 30), (1, 1), (2, 200)])
def test_figures_of_any_size(size):
    image = Image.effect_noise(size, 80)
    layouts = [(name, make_layout(with_layout(TILED, name))) for name in ("naflex", "multicrop:16", "multicrop_s2:8")]
    assert comparison(image, layouts).png.startswith(b"\x89PNG")
    figure = layout_figure(image, layouts[2][1], "image 1")
    assert figure.caption.startswith(f"image 1: {size[0]}×{size[1]} pixels, multicrop_s2\n") and figure.dark
