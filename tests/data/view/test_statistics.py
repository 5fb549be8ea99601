"""Tests of dataset statistics: indexes whose numbers can be counted by hand; their tables, figure and page."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from phivision_jax.batch import RowShape
from phivision_jax.data.plan.mixture import Mixture
from phivision_jax.data.plan.plan import make_plan
from phivision_jax.data.records import MODES, TASKS
from phivision_jax.data.store.dataset import Index
from phivision_jax.data.view.statistics import MAX_IMAGES, compute
from phivision_jax.data.view.statistics_report import bars, figure, tables
from phivision_jax.io.html import page, print_sections
from tests.support.datasets import write_dataset
from tests.support.records import CONFIG, mixed_records

THINK, NOTHINK = MODES.index("think"), MODES.index("nothink")
GENERAL, MATH = TASKS.index("general"), TASKS.index("math")


class FakeDataset:
    """An index, a manifest, and ids: the only things that statistics read."""

    def __init__(self, name: str, records: list[tuple[int, list[tuple[int, int]], int, int]], **counts: Any) -> None:
        self.index = Index(
            text_tokens=np.array([tokens for tokens, _, _, _ in records], np.int32),
            image_offsets=np.cumsum([0, *(len(sizes) for _, sizes, _, _ in records)], dtype=np.int64),
            image_sizes=np.array([s for _, sizes, _, _ in records for s in sizes], np.int32).reshape(-1, 2),
            modes=np.array([mode for _, _, mode, _ in records], np.int8),
            tasks=np.array([task for _, _, _, task in records], np.uint8),
        )
        self.directory = Path(name)
        default: dict[str, Any] = {"system_messages": 0, "mode_from": {"stated": len(records)}, "quarantined": {}}
        self.manifest = {"counts": default | counts}

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> SimpleNamespace:
        return SimpleNamespace(id=f"{self.directory.name}-{i}")


# Patches of 8x8, from 4 to 64 of them: 24x16 is 6 patches, 64x64 is 64, 800x800 is shrunk to 64.
PHOTOS = FakeDataset(
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
TEXT = FakeDataset("text", [(100, [], THINK, MATH), (3, [], NOTHINK, MATH)], quarantined={"role": 1})
SHAPE = RowShape(90, 1, 65)


def test_compute_one_dataset() -> None:
    (numbers,) = compute([PHOTOS], CONFIG, SHAPE).groups
    spreads = numbers["spreads"]
    assert (numbers["name"], numbers["examples"], numbers["images"]) == ("photos", 4, 15)
    assert numbers["text_tokens"] == 65
    assert numbers["patches"] == numbers["image_tokens"] == 6 + 70 + 64 + 66
    assert spreads["text_tokens"] == {"min": 5, "median": 15, "mean": 16.25, "p95": pytest.approx(28.5), "max": 30}
    assert (spreads["tokens"]["min"], spreads["tokens"]["max"]) == (16, 94)
    assert spreads["patches"]["median"] == 65
    assert [spreads["image_patches"][key] for key in ("min", "median", "max")] == [6, 6, 64]
    assert spreads["megapixels"]["max"] == 0.64
    assert numbers["images_per_example"] == [0, 2, 1, 0, 0, 0, 0, 0, 1]
    assert MAX_IMAGES == 8
    examples, tokens = numbers["examples_by"], numbers["tokens_by"]
    assert examples["nothink"]["general"] == 3 and examples["think"]["math"] == 1
    assert tokens["nothink"]["general"] == 16 + 90 + 71 and tokens["think"]["math"] == 94
    assert sum(sum(by_task.values()) for by_task in examples.values()) == 4
    assert (numbers["system_messages"], numbers["mode_from"]) == (1, {"stated": 3, "default": 1})
    assert numbers["quarantined"] == {"role": 2, "image-broken": 1}


def test_compute_counts_what_exceeds_a_row_once() -> None:
    """T = 90, P = 65: record 2 has 94 tokens; 1 (70 patches) and 3 (66) have too many patches; 2 does not."""
    (numbers,) = compute([PHOTOS], CONFIG, SHAPE).groups
    assert (numbers["too_long"], numbers["too_many_patches"]) == (1, 2)
    assert [(r["id"], r["tokens"], r["patches"]) for r in numbers["largest"]] == [
        ("photos-2", 94, 64),
        ("photos-1", 90, 70),
        ("photos-3", 71, 66),
    ]
    # The one that fits, record 0, fills a row with 16 of 90 tokens and 6 of 65 patches.
    assert numbers["rows"] == 1
    assert numbers["text_padding"] == pytest.approx(1 - 16 / 90)
    assert numbers["patch_padding"] == pytest.approx(1 - 6 / 65)


def test_compute_counts_too_long_before_too_many_patches() -> None:
    both = FakeDataset("set", [(10, [(64, 64)] * 2, NOTHINK, GENERAL), (1, [(24, 16)], NOTHINK, GENERAL)])
    (numbers,) = compute([both], CONFIG, SHAPE).groups
    assert (numbers["too_long"], numbers["too_many_patches"]) == (1, 0)


def test_compute_places_images_in_vision_rows() -> None:
    """P = 64, R = 2: 64 + 64 patches fit, one image per vision row; 36 + 36 + 36 do not, although 108 <= 128."""
    images = [[(64, 64)] * 2, [(48, 48)] * 3, [(48, 48), (24, 16)], []]
    dataset = FakeDataset("set", [(1, sizes, NOTHINK, GENERAL) for sizes in images])
    (numbers,) = compute([dataset], CONFIG, RowShape(1000, 2, 64)).groups
    assert (numbers["too_long"], numbers["too_many_patches"]) == (0, 1)
    assert [r["id"] for r in numbers["largest"]] == ["set-1"]


def test_compute_keeps_images_with_their_records() -> None:
    again = FakeDataset("again", [])
    again.index, again.manifest = PHOTOS.index, PHOTOS.manifest
    once, _, twice = compute([PHOTOS, again], CONFIG, SHAPE).groups
    assert twice["patches"] == 2 * once["patches"]
    assert twice["spreads"]["tokens"] == {**once["spreads"]["tokens"], "p95": twice["spreads"]["tokens"]["p95"]}
    assert (twice["too_long"], twice["too_many_patches"]) == (2, 4)
    assert twice["spreads"]["patches"]["mean"] == once["spreads"]["patches"]["mean"]


def test_compute_adds_up_datasets() -> None:
    stats = compute([PHOTOS, TEXT], CONFIG, SHAPE)
    photos, text, both = stats.groups
    assert [numbers["name"] for numbers in stats.groups] == ["photos", "text", "all"]
    assert (text["images"], text["patches"]) == (0, 0)
    assert text["spreads"]["image_patches"] is text["spreads"]["megapixels"] is text["spreads"]["patches"] is None
    assert both["examples"] == 6 and both["text_tokens"] == 65 + 103 and both["images"] == 15
    assert both["quarantined"] == {"role": 3, "image-broken": 1}
    assert both["mode_from"] == {"stated": 5, "default": 1}
    assert both["tokens_by"]["think"]["math"] == 94 + 100
    assert both["images_per_example"][0] == 2
    # Records of the second dataset keep their own numbers and names.
    largest = [(r["dataset"], r["record"], r["id"]) for r in both["largest"]]
    assert largest[:2] == [("text", 0, "text-0"), ("photos", 2, "photos-2")]
    for name, counts in both["histograms"].items():
        parts = zip(photos["histograms"][name], text["histograms"][name], strict=True)
        assert counts == [a + b for a, b in parts]


def test_histograms_count_every_example_and_image() -> None:
    stats = compute([PHOTOS], CONFIG, SHAPE)
    (numbers,) = stats.groups
    assert {name: sum(counts) for name, counts in numbers["histograms"].items()} == {
        "text_tokens": 4, "tokens": 4, "patches": 4, "image_patches": 15,
    }  # fmt: skip
    resolutions = numbers["resolutions"]
    assert np.sum(resolutions) == 15
    width_bin, height_bin = (int(np.digitize(side, stats.edges["side"])) - 1 for side in (24, 16))
    assert resolutions[width_bin][height_bin] == 13 and resolutions[height_bin][width_bin] == 0
    # 1x1 pixels are below the first bin and counted in it.
    (tiny,) = compute([FakeDataset("tiny", [(1, [(1, 1)], 0, 0)])], CONFIG, SHAPE).groups
    assert tiny["resolutions"][0][0] == 1


def test_epoch_estimate_agrees_with_a_plan(tmp_path, processor) -> None:
    dataset = write_dataset(tmp_path / "set", mixed_records(40), processor)
    shape = RowShape(160, 2, 80)
    plan = make_plan([dataset], Mixture.from_directories("set"), processor, shape)
    (numbers,) = compute([dataset], CONFIG, shape).groups
    assert numbers["rows"] == pytest.approx(plan.num_rows, abs=1)  # another order may pack a row better or worse
    assert numbers["text_padding"] == pytest.approx(plan.text_padding, abs=0.03)


def test_compute_reads_only_the_largest_records() -> None:
    n, read = 20_000, []

    class Large(FakeDataset):
        def __getitem__(self, i: int) -> SimpleNamespace:
            read.append(i)
            return super().__getitem__(i)

    large = Large("large", [(i % 100, [], NOTHINK, GENERAL) for i in range(n)])
    (numbers,) = compute([large], CONFIG, SHAPE).groups
    assert numbers["examples"] == n
    assert sum(numbers["histograms"]["tokens"]) == n - n // 100  # those without tokens are below the first bin
    assert numbers["too_long"] == n * 9 // 100 and len(numbers["largest"]) == len(read) == 5


def test_tables_in_the_terminal() -> None:
    console = Console(file=io.StringIO(), width=120, color_system=None)
    print_sections(tables(compute([PHOTOS, TEXT], CONFIG, SHAPE)), console)
    text = console.file.getvalue()
    lines = {re.sub(r"\s+", " ", line.strip("│ ")).replace("│ ", "│") for line in text.splitlines()}
    for line in (
        "examples │4 │2 │6",
        "with 8 images or more │1 (25.0%) │– │1 (16.7%)",
        "not imported │3 (42.9%) │1 (33.3%) │4 (40.0%)",
        "role │2 │1 │3",
        "with a system message │1 (25.0%) │0 │1 (16.7%)",
        "think │25.0% · 34.7% │50.0% · 97.1% │33.3% · 51.9%",
        "math │25.0% · 34.7% │100.0% · 100.0% │50.0% · 52.7%",
        "math, think │25.0% · 34.7% │50.0% · 97.1% │33.3% · 51.9%",
        "more tokens than a row │1 (25.0%) │1 (50.0%) │2 (33.3%)",
        "text #0 │text-0 │100 │0",
    ):
        assert line in lines, f"{line!r} is not in\n{text}"


def test_figure_and_json() -> None:
    stats = compute([PHOTOS, TEXT], CONFIG, SHAPE)
    plots = figure(stats)
    for png in (plots.png, plots.dark):
        with Image.open(io.BytesIO(png)) as image:
            assert image.format == "PNG" and image.size == (1496, 902)
            assert len(set(np.asarray(image.convert("L")).reshape(-1).tolist())) > 50
    values = json.loads(json.dumps(dataclasses.asdict(stats)))
    assert values["groups"][2]["examples"] == 6 and set(values["groups"][0]["examples_by"]["think"]) == set(TASKS)


def test_page_holds_every_table() -> None:
    odd = FakeDataset("a<b", [(10, [(24, 16)], NOTHINK, GENERAL)])
    report = tables(compute([odd, TEXT], CONFIG, SHAPE))
    html = page("a<b, text", report)
    assert "a&lt;b" in html and "a<b" not in html
    for section in report:
        assert section.title in html
        for row in section.table.rows:
            assert f">{row[-1]}</td>" in html


def test_compute_without_images_or_datasets() -> None:
    stats = compute([TEXT], CONFIG, RowShape(200))
    assert stats.groups[-1]["patch_padding"] == 0 and stats.groups[-1]["rows"] == 1
    assert figure(stats).png
    with pytest.raises(ValueError, match="at least one dataset"):
        compute([], CONFIG, SHAPE)


def test_figure_draws_many_datasets_together() -> None:
    many = [FakeDataset(f"set{i}", [(10 + i, [(24, 16)], NOTHINK, GENERAL)] * (i + 1)) for i in range(12)]
    stats = compute(many, CONFIG, SHAPE)
    assert len(stats.groups) == 13 and stats.groups[-1]["examples"] == sum(range(1, 13))
    stacked = [(label, len(groups)) for label, groups in bars(stats)]
    assert stacked[0] == ("set11", 1) and stacked[-1] == ("5 others", 5) and len(stacked) == 8
    assert figure(stats).png.startswith(b"\x89PNG")
