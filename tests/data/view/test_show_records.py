"""Pictures of examples and rows: the data behind them by hand, colours at known pixels, what the commands refuse."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor, ImageDraw

from phivision_jax.batch import RowShape
from phivision_jax.cli import main
from phivision_jax.data.plan.mixture import Mixture
from phivision_jax.data.plan.plan import make_plan
from phivision_jax.data.store.importing import write_dataset
from phivision_jax.data.view import drawing, show_records, show_rows
from phivision_jax.data.view.drawing import Run, draw_runs, shortened
from phivision_jax.data.view.show_records import Piece, examples_sheet, picture, pieces
from phivision_jax.data.view.show_rows import STRIP_LEFT, STRIP_WIDTH, ImageSpan, layout, rows_sheet
from phivision_jax.images.layout import PatchedImage
from phivision_jax.rows import expand, fill_rows
from phivision_jax.text.tokenizer import Tokenizer
from tests.support.records import CONFIG, make_record, mixed_records, png

SHAPE = RowShape(160, 2, 80)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, processor):
    return write_dataset(tmp_path_factory.mktemp("data") / "set", mixed_records(24), processor, progress=False)


@pytest.fixture(scope="module")
def plan(dataset, processor):
    return make_plan([dataset], Mixture.of("set"), processor, SHAPE)


# ---------------------------------------------------------------------------------------------------------------------
# Examples.


def test_pieces_are_what_the_loss_sees(processor) -> None:
    record = make_record(2, ((24, 16), (64, 64)))
    example = processor.encode(record.messages, record.images, mode="nothink")
    assert pieces(example, processor.tokenizer) == [
        Piece("context", "<|im_start|>user<|im_sep|>", 3),
        Piece("image", "image 1 ▢×6", 6),
        Piece("image", "image 2 ▢×64", 64),
        Piece("context", "is there a red red shape?<|im_end|><|im_start|>assistant<|im_sep|>", 11),
        Piece("learned", "<|dummy_84|>yes<|im_end|>", 3),
    ]


def test_long_stretches_lose_their_middle_and_say_so() -> None:
    tokenizer = Tokenizer.small()
    ids = tokenizer.encode("red " * 40)
    n, at = len(ids), tokenizer.encode("yes")
    example = expand([*ids, *at], [], [-100] * n + at)
    found = pieces(example, tokenizer, most=11)
    assert [p.kind for p in found] == ["context", "cut", "context", "learned"]
    assert [p.columns for p in found] == [5, n - 11, 6, len(at)]
    assert sum(p.columns for p in found) == len(example.tokens)
    assert found[1].text == f" … {n - 11} tokens … "
    assert pieces(example, tokenizer, most=n)[0].columns == n


def test_picture_is_the_pixels_of_the_patches() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    tiles = pixels.reshape(2, 8, 3, 8, 3).swapaxes(1, 2).reshape(6, -1)
    np.testing.assert_array_equal(np.asarray(picture(PatchedImage(tiles, (2, 3)), 8)), pixels)


def test_sheet_of_examples(dataset, processor, tmp_path: Path) -> None:
    examples_sheet(dataset, processor, [0, 4], tmp_path / "sub" / "examples.png")
    with Image.open(tmp_path / "sub" / "examples.png") as sheet:
        assert sheet.format == "PNG" and sheet.width == drawing.WIDTH and 300 < sheet.height < 3000
        colours = {colour for _, colour in sheet.convert("RGB").getcolors(1 << 24)}
    assert (
        ImageColor.getrgb(show_records.LEARNED_PAPER) in colours and ImageColor.getrgb(show_records.LEARNED) in colours
    )
    with pytest.raises(ValueError, match="at least one record"):
        examples_sheet(dataset, processor, [], tmp_path / "none.png")


def test_a_record_that_cannot_be_encoded_is_drawn_as_such(processor, tmp_path: Path, monkeypatch) -> None:
    broken = make_record(1, images=(png(24, 16)[:-30],))
    dataset = write_dataset(tmp_path / "set", [make_record(0), broken], processor, progress=False)
    seen: list[str] = []
    monkeypatch.setattr(show_records, "_laid_out", _spy(show_records._laid_out, seen))
    examples_sheet(dataset, processor, [0, 1], tmp_path / "x.png")
    assert "the loss sees 3" in seen[0]
    assert "hole" in seen[1] and "image-broken" in seen[1] and "truncated" in seen[1]


def _spy(function, seen):
    def spied(title, numbers, body, pictures):
        seen.append(numbers + " ".join(run.text for run in body))
        return function(title, numbers, body, pictures)

    return spied


# ---------------------------------------------------------------------------------------------------------------------
# Text.


@pytest.mark.parametrize("width", [90, 300])
def test_text_is_set_within_its_width_and_nothing_is_lost(width: int) -> None:
    words = "a few words, " * 12 + "and" + "averylongone" * 20
    drawn: list[tuple[float, str]] = []

    class Noted(ImageDraw.ImageDraw):
        def text(self, xy, text, *args, **how):
            drawn.append((xy[0], text))
            super().text(xy, text, *args, **how)

    image = Image.new("RGB", (width, 4000), "white")
    height = draw_runs(Noted(image), (0, 0), width, [Run(words), Run("\nend")])
    assert "".join(text for _, text in drawn) == words + "end"
    face = drawing.font(15)
    assert all(x + face.getlength(text.rstrip()) <= width + 1 for x, text in drawn)
    assert height == draw_runs(None, (0, 0), width, [Run(words), Run("\nend")])
    assert (np.asarray(image.convert("L"))[height:] == 255).all()


def test_shortened() -> None:
    assert shortened("abcdefghij", 10) == "abcdefghij"
    assert shortened("abcdefghijk", 10) == "abcd…ghijk"


# ---------------------------------------------------------------------------------------------------------------------
# Rows.


def row_of(examples, shape):
    return fill_rows([examples], shape, CONFIG)


def image_of(rows: int, columns: int) -> PatchedImage:
    return PatchedImage(np.zeros((rows * columns, CONFIG.vision.patch_dim), np.uint8), (rows, columns))


def test_layout_by_hand() -> None:
    """Three examples in T = 20: 1 has two images side by side (6 and 4 patches), 2 is text, 3 has one of 3 patches.

    R = 2, P = 8: the 6 go to vision row 0, the 4 find no room there (row 1), the 3 go where they fit best (row 1).
    """
    first = expand([5, -200, -200, 6, 7], [image_of(2, 3), image_of(2, 2)], [-100, -100, -100, -100, 7])
    second = expand([5, 6], [], [-100, 6])
    third = expand([-200, 9], [image_of(1, 3)], [-100, 9])
    found = layout(row_of([first, second, third], RowShape(20, 2, 8)), 0)
    assert found.segments == ((0, 13), (13, 15), (15, 19))
    assert found.images == (
        ImageSpan(segment=1, number=1, columns=(1, 7), vision_row=0, patches=(0, 6)),
        ImageSpan(segment=1, number=2, columns=(7, 11), vision_row=1, patches=(0, 4)),
        ImageSpan(segment=3, number=1, columns=(15, 18), vision_row=1, patches=(4, 7)),
    )
    # A column is weighed where its target, the next token, is learned.
    assert np.flatnonzero(found.loss).tolist() == [11, 13, 17]
    assert (found.columns_used, found.patches_used) == (19, 13)


def test_images_of_two_examples_side_by_side_are_told_apart() -> None:
    one = expand([-200], [image_of(1, 2)])
    found = layout(row_of([one, one], RowShape(4, 1, 4)), 0)
    assert [(i.segment, i.number, i.columns, i.patches) for i in found.images] == [
        (1, 1, (0, 2), (0, 2)),
        (2, 1, (2, 4), (2, 4)),
    ]


def test_an_empty_row_and_one_without_images() -> None:
    shape = RowShape(4, 1, 0)
    empty = layout(row_of([], shape), 0)
    assert (empty.segments, empty.images, empty.columns_used) == ((), (), 0)
    assert layout(row_of([expand([1, 2], [])], shape), 0).segments == ((0, 2),)


def test_every_column_has_its_example_s_colour(dataset, plan, processor, tmp_path: Path) -> None:
    """Read the strip back from the PNG: at the middle of every column the colour of its owner, hatched for images."""
    rows = [0, 1]
    rows_sheet(plan, [dataset], processor, rows, tmp_path / "rows.png")
    with Image.open(tmp_path / "rows.png") as sheet:
        assert sheet.format == "PNG" and sheet.width == drawing.WIDTH
        pixels = np.asarray(sheet.convert("RGB"))
    batches = show_rows.batches([dataset], plan, processor, batch_rows=1, num_threads=0)
    y = drawing.MARGIN + 26  # below the legend
    for batch, info in [next(batches) for _ in rows]:
        y += 2 * drawing.MARGIN
        found = layout(batch, 0)
        assert found.images and len(found.segments) > 1
        of_image = batch.vision_index[0] >= 0
        for column, segment in enumerate(batch.segment_ids[0].tolist()):
            x = STRIP_LEFT + round((column + 0.5) * STRIP_WIDTH / SHAPE.length)
            strip = {tuple(p) for p in pixels[y + 36 : y + 34 + 12, x - 2 : x + 3].reshape(-1, 3).tolist()}
            if not segment:
                assert strip == {(255, 255, 255)}
                continue
            own = ImageColor.getrgb(show_rows.COLOURS[segment - 1])
            assert own in strip, (column, segment, strip)
            assert (len(strip - {(255, 255, 255)}) > 1) == of_image[column], (column, strip)
            below = tuple(pixels[y + 34 + 44 + 5, x].tolist())
            assert (below == ImageColor.getrgb(show_rows.LOSS)) == found.loss[column], column
        y += show_rows._block(plan, [dataset], info.step, batch, info).height


def test_rows_name_holes_and_refuse_what_is_not_there(processor, tmp_path: Path) -> None:
    broken = make_record(1, ((64, 64),), images=(png(64, 64)[:-30],))
    dataset = write_dataset(tmp_path / "set", [make_record(0), broken], processor, progress=False)
    plan = make_plan([dataset], Mixture.of("set"), processor, SHAPE)
    batch, info = next(show_rows.batches([dataset], plan, processor, batch_rows=1, num_threads=0))
    names = ["".join(run.text for run in runs) for runs in show_rows._names(plan, [dataset], 0, layout(batch, 0), info)]
    assert sorted("hole: image-broken" in name for name in names) == [False, True]
    assert any("r001" in name and "64 patches" in name for name in names)
    with pytest.raises(IndexError, match="row 1 of a plan with 1 rows"):
        rows_sheet(plan, [dataset], processor, [1], tmp_path / "x.png")
    with pytest.raises(ValueError, match="at least one row"):
        rows_sheet(plan, [dataset], processor, [], tmp_path / "x.png")


# ---------------------------------------------------------------------------------------------------------------------
# The commands.


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["phivision", "data", *map(str, arguments)])
        try:
            main.main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        shown = capsys.readouterr()
        return code, shown.out + shown.err

    return call


def test_commands(run, dataset, plan, tmp_path: Path) -> None:
    # The command's processor has the released patch settings, hence a plan of its own.
    where = dataset.directory
    code, text = run("stats", where, "--length", 400, "--num-patches", 300, "--out", tmp_path / "stats")
    assert code == 0 and "longer than 400 columns" in text
    assert {p.name for p in (tmp_path / "stats").iterdir()} == {"stats.png", "stats.html", "stats.json"}
    for arguments in (("--records", 0, 3), ("--ids", "r005"), ("--sample", 2)):
        code, text = run("show", where, *arguments, "--out", tmp_path / "show.png")
        assert code == 0 and "drawn: " in text
    code, _ = run("plan", where, "--out", tmp_path / "plan", "--length", 800, "--num-patches", 700)
    assert code == 0
    code, text = run("show", where, "--plan", tmp_path / "plan", "--rows", 0, "--out", tmp_path / "rows.png")
    assert code == 0, text
    with Image.open(tmp_path / "rows.png") as sheet:
        assert sheet.width == drawing.WIDTH


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--records", "99"), "--records 99: .*set has records 0 to 23"),
        (("--ids", "nobody"), "--ids nobody: .* has no such record"),
        (("--ids", "r001", "--records", "1"), "give --records or --ids, not both"),
        (("--sample", "0"), "--sample must be 1 or more"),
        (("--plan", "nowhere"), "no plan at nowhere"),
        (("--plan", "nowhere", "--ids", "r001"), "--plan draws rows"),
    ],
)
def test_what_show_refuses(run, dataset, tmp_path: Path, arguments, message: str) -> None:
    code, text = run("show", dataset.directory, *arguments, "--out", tmp_path / "x.png")
    assert code == 1 and not (tmp_path / "x.png").exists()
    assert re.search(message, " ".join(text.split())), text
    assert "Traceback" not in text


def test_what_needs_the_right_plan_or_tokenizer(run, dataset, processor, tmp_path: Path) -> None:
    other = write_dataset(tmp_path / "other", mixed_records(6), processor, progress=False)
    code, _ = run("plan", dataset.directory, "--out", tmp_path / "plan", "--length", 800, "--num-patches", 700)
    assert code == 0
    code, text = run("show", other.directory, "--plan", tmp_path / "plan", "--out", tmp_path / "x.png")
    assert code == 1 and "was made from set: name these" in " ".join(text.split())
    manifest = (other.directory / "manifest.json").read_text()
    (other.directory / "manifest.json").write_text(manifest.replace(processor.text_fingerprint, "0" * 64))
    code, text = run("show", other.directory, "--out", tmp_path / "x.png")
    said = " ".join(text.split())
    assert code == 1 and "another tokenizer or chat template" in said and "or name the checkpoint" in said
    code, text = run("stats", other.directory)
    assert code == 0  # numbers need no tokenizer
    code, text = run("show", dataset.directory, other.directory, "--out", tmp_path / "x.png")
    assert code == 1
