"""Statistics by hand: made-up indexes whose every number can be counted, then tables, figure and page of them."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from phivision_jax.batch import RowShape
from phivision_jax.data.plan.mixture import Mixture
from phivision_jax.data.plan.packing import Lengths
from phivision_jax.data.plan.plan import make_plan
from phivision_jax.data.records import MODES, TASKS
from phivision_jax.data.store.dataset import Index
from phivision_jax.data.store.importing import write_dataset
from phivision_jax.data.view.statistics import MOST_IMAGES, Spread, _overflow, compute
from phivision_jax.data.view.statistics_page import plot_png, write_html
from phivision_jax.data.view.statistics_tables import sections
from tests.support.records import CONFIG, mixed_records

THINK, NOTHINK = MODES.index("think"), MODES.index("nothink")
GENERAL, MATH = TASKS.index("general"), TASKS.index("math")


class Counted:
    """An index, a manifest, and ids: all that statistics look at."""

    def __init__(self, name: str, records: list[tuple[int, list[tuple[int, int]], int, int]], **counts: Any) -> None:
        self.index = Index(
            text_tokens=np.array([tokens for tokens, _, _, _ in records], np.int32),
            image_offsets=np.cumsum([0, *(len(sizes) for _, sizes, _, _ in records)], dtype=np.int64),
            image_sizes=np.array([s for _, sizes, _, _ in records for s in sizes], np.int32).reshape(-1, 2),
            modes=np.array([mode for _, _, mode, _ in records], np.int8),
            tasks=np.array([task for _, _, _, task in records], np.uint8),
        )
        self.directory = Path(name)
        none: dict[str, Any] = {"system_messages": 0, "mode_from": {"stated": len(records)}, "quarantined": {}}
        self.manifest = {"counts": none | counts}

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> SimpleNamespace:
        return SimpleNamespace(id=f"{self.directory.name}-{i}")


# Patches of 8x8, from 4 to 64 of them: 24x16 is 6 patches, 64x64 is 64, 800x800 is shrunk to 64.
PHOTOS = Counted(
    "photos",
    [
        (10, [(24, 16)], NOTHINK, GENERAL),
        (20, [(64, 64), (24, 16)], NOTHINK, GENERAL),
        (30, [(800, 800)], THINK, MATH),
        (5, [(24, 16)] * 11, NOTHINK, GENERAL),
    ],
    system_messages=1,
    mode_from={"stated": 3, "default": 1},
    quarantined={"role": 2, "image-broken": 1},
)
TEXT = Counted("text", [(100, [], THINK, MATH), (3, [], NOTHINK, MATH)], quarantined={"role": 1})
SHAPE = RowShape(90, 1, 65)


def test_numbers_of_one_dataset_by_hand() -> None:
    (part,) = compute([PHOTOS], CONFIG, SHAPE).parts
    assert (part.name, part.examples, part.images) == ("photos", 4, 15)
    assert part.text_tokens == 65
    assert part.patches == 6 + 70 + 64 + 66
    assert part.text == Spread(least=5, median=15, mean=16.25, p95=pytest.approx(28.5), most=30)
    assert part.columns.least, part.columns.most == (16, 94)
    assert part.patches_per_example.median == 65
    assert (part.patches_per_image.least, part.patches_per_image.median, part.patches_per_image.most) == (6, 6, 64)
    assert part.megapixels.most == 0.64
    assert part.images_per_example == (0, 2, 1, 0, 0, 0, 0, 0, 1)
    assert MOST_IMAGES == 8
    assert part.examples_by[NOTHINK][GENERAL] == 3 and part.examples_by[THINK][MATH] == 1
    assert part.columns_by[NOTHINK][GENERAL] == 16 + 90 + 71 and part.columns_by[THINK][MATH] == 94
    assert sum(map(sum, part.examples_by)) == 4
    assert (part.system_messages, part.mode_from) == (1, {"stated": 3, "default": 1})
    assert part.quarantined == {"role": 2, "image-broken": 1}


def test_what_does_not_fit_is_counted_once_and_the_largest_is_named_first() -> None:
    """T = 90, P = 65: record 2 has 94 columns; 1 (70 patches) and 3 (66) have too many patches; 2 is not too large."""
    (part,) = compute([PHOTOS], CONFIG, SHAPE).parts
    assert (part.too_long, part.too_many_patches) == (1, 2)
    assert [(r.id, r.columns, r.patches) for r in part.largest] == [
        ("photos-2", 94, 64),
        ("photos-1", 90, 70),
        ("photos-3", 71, 66),
    ]
    # What is left, record 0, fills a row with 16 of 90 columns and 6 of 65 patches.
    assert part.rows == 1
    assert part.text_padding == pytest.approx(1 - 16 / 90)
    assert part.patch_padding == pytest.approx(1 - 6 / 65)


def test_too_large_both_ways_counts_as_too_long() -> None:
    both_ways = Counted("set", [(10, [(64, 64)] * 2, NOTHINK, GENERAL), (1, [(24, 16)], NOTHINK, GENERAL)])
    (part,) = compute([both_ways], CONFIG, SHAPE).parts
    assert (part.too_long, part.too_many_patches) == (1, 0)


def test_images_of_a_second_dataset_stay_with_their_records() -> None:
    again = Counted("again", [])
    again.index, again.manifest = PHOTOS.index, PHOTOS.manifest
    once, _, twice = compute([PHOTOS, again], CONFIG, SHAPE).parts
    assert twice.patches == 2 * once.patches
    assert (twice.columns.least, twice.columns.mean, twice.columns.most) == (16, once.columns.mean, 94)
    assert (twice.too_long, twice.too_many_patches) == (2, 4)
    assert twice.patches_per_example.mean == once.patches_per_example.mean


def test_several_datasets_and_their_sum() -> None:
    stats = compute([PHOTOS, TEXT], CONFIG, SHAPE)
    photos, text, both = stats.parts
    assert [part.name for part in stats.parts] == ["photos", "text", "all"] and stats.all is both
    assert (text.images, text.patches, text.patches_per_image, text.megapixels) == (0, 0, None, None)
    assert both.examples == 6 and both.text_tokens == 65 + 103 and both.images == 15
    assert both.quarantined == {"role": 3, "image-broken": 1}
    assert both.mode_from == {"stated": 5, "default": 1}
    assert both.columns_by[THINK][MATH] == 94 + 100
    assert both.images_per_example[0] == 2
    # Records of the second dataset keep their own numbers and names.
    assert [(r.dataset, r.record, r.id) for r in both.largest][:2] == [("text", 0, "text-0"), ("photos", 2, "photos-2")]
    for name, counts in both.histograms.items():
        assert list(counts) == [a + b for a, b in zip(photos.histograms[name], text.histograms[name], strict=True)]


def test_histograms_hold_every_example_and_every_image() -> None:
    (part,) = compute([PHOTOS], CONFIG, SHAPE).parts
    assert {name: sum(counts) for name, counts in part.histograms.items()} == {
        "text": 4, "columns": 4, "patches": 4, "image_patches": 15,
    }  # fmt: skip
    assert np.sum(part.resolutions) == 15
    edges = compute([PHOTOS], CONFIG, SHAPE).edges["side"]
    wide, high = (int(np.digitize(side, edges)) - 1 for side in (24, 16))
    assert part.resolutions[wide][high] == 13 and part.resolutions[high][wide] == 0
    # 1x1 pixels lie below the first bin and are counted in it.
    (tiny,) = compute([Counted("tiny", [(1, [(1, 1)], 0, 0)])], CONFIG, SHAPE).parts
    assert tiny.resolutions[0][0] == 1


def test_images_over_several_vision_rows() -> None:
    """P = 10, R = 2: 6 + 6 fit, one row each; 6 + 6 + 6 do not, though 18 <= 20; 11 never does."""
    images = [[6, 6], [6, 6, 6], [11], [10, 10], [4, 6, 10], []]
    patches = np.array([p for own in images for p in own])
    offsets = np.cumsum([0, *map(len, images)])
    lengths = Lengths(np.array([sum(own) + 1 for own in images]), patches, offsets)
    _, too_many = _overflow(lengths, RowShape(100, 2, 10))
    assert too_many.tolist() == [False, True, True, False, False, False]


def test_the_estimate_is_what_a_plan_of_one_window_fills(tmp_path, processor) -> None:
    dataset = write_dataset(tmp_path / "set", mixed_records(40), processor, progress=False)
    shape = RowShape(160, 2, 80)
    plan = make_plan([dataset], Mixture.of("set"), processor, shape).summary()
    (part,) = compute([dataset], CONFIG, shape).parts
    assert part.rows == pytest.approx(plan.rows, abs=1)  # another order may pack a row better or worse
    assert part.text_padding == pytest.approx(plan.text_padding, abs=0.03)


def test_records_are_not_read_but_for_the_names_of_the_largest() -> None:
    n, read = 20_000, []

    class Large(Counted):
        def __getitem__(self, i: int) -> SimpleNamespace:
            read.append(i)
            return super().__getitem__(i)

    large = Large("large", [(i % 100, [], NOTHINK, GENERAL) for i in range(n)])
    (part,) = compute([large], CONFIG, SHAPE).parts
    assert part.examples == n and sum(part.histograms["columns"]) == n - n // 100  # of no tokens: below the first bin
    assert part.too_long == n * 9 // 100 and len(part.largest) == len(read) == 5


def test_tables_say_the_numbers_in_words() -> None:
    text = str(compute([PHOTOS, TEXT], CONFIG, SHAPE))
    lines = {re.sub(r"\s+", " ", line.strip("│ ")).replace("│ ", "│") for line in text.splitlines()}
    for line in (
        "examples │4 │2 │6",
        "… with 8 images or more │1 (25.0%) │0 │1 (16.7%)",
        "not imported │3 (42.9%) │1 (33.3%) │4 (40.0%)",
        "role │2 │1 │3",
        "examples with a system message │1 (25.0%) │0 │1 (16.7%)",
        "think │25.0% · 34.7% │50.0% · 97.1% │33.3% · 51.9%",
        "longer than 90 columns │1 (25.0%) │1 (50.0%) │2 (33.3%)",
        "text #0 │text-0 │100 │0",
    ):
        assert line in lines, f"{line!r} is not in\n{text}"


def test_png_and_json(tmp_path: Path) -> None:
    stats = compute([PHOTOS, TEXT], CONFIG, SHAPE)
    plot_png(stats, tmp_path / "stats.png")
    with Image.open(tmp_path / "stats.png") as image:
        assert image.format == "PNG" and image.size == (1496, 902)
        assert len(set(np.asarray(image.convert("L")).reshape(-1).tolist())) > 50
    values = json.loads(json.dumps(stats.to_json()))
    assert values["parts"][2]["examples"] == 6 and values["tasks"] == list(TASKS)


def test_page_is_one_file_with_figures_for_light_and_dark(tmp_path: Path) -> None:
    odd = Counted("a<b", [(10, [(24, 16)], NOTHINK, GENERAL)])
    stats = compute([odd, TEXT], CONFIG, SHAPE)
    write_html(stats, tmp_path / "stats.html")
    page = (tmp_path / "stats.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 2
    assert not re.search(r'(src|href|srcset)="(?!data:)', page), "the page fetches something"
    assert "a&lt;b" in page and "a<b" not in page
    for section in sections(stats):
        for row in section.rows:
            assert f"<td>{row[-1]}</td>" in page or len(row) == 1 or "<" in row[-1]


def test_text_alone_and_no_dataset(tmp_path: Path) -> None:
    stats = compute([TEXT], CONFIG, RowShape(200))
    assert stats.all.patch_padding == 0 and stats.all.rows == 1
    plot_png(stats, tmp_path / "text.png")
    with pytest.raises(ValueError, match="at least one dataset"):
        compute([], CONFIG, SHAPE)


def test_many_datasets_share_the_colours(tmp_path: Path) -> None:
    many = [Counted(f"set{i}", [(10 + i, [(24, 16)], NOTHINK, GENERAL)] * (i + 1)) for i in range(12)]
    stats = compute(many, CONFIG, SHAPE)
    assert len(stats.parts) == 13 and stats.all.examples == sum(range(1, 13))
    plot_png(stats, tmp_path / "many.png")
    assert io.BytesIO((tmp_path / "many.png").read_bytes()).read(4) == b"\x89PNG"
