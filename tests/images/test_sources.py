"""Every form in which an image is given, and which of them are turned upright."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageOps

from phivision_jax.data.sources.fetch import fetch
from phivision_jax.data.sources.item_options import ItemOptions
from phivision_jax.images.decode import open_image
from phivision_jax.images.sources import pixels

PIXELS = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)


def encoded(orientation: int = 1, format: str = "PNG") -> bytes:
    image, file = Image.fromarray(PIXELS), io.BytesIO()
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(file, format, exif=exif)
    return file.getvalue()


def test_all_forms_give_the_same_pixels(tmp_path: Path) -> None:
    content, file = encoded(), tmp_path / "a photo.png"
    file.write_bytes(content)
    base = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    written = io.BytesIO()
    written.write(content)  # and is at its end
    forms = [content, bytearray(content), memoryview(content), written, file.open("rb"), file, str(file), base]
    forms += [f"file://{str(file).replace(' ', '%20')}", f"FILE:{file}", Image.fromarray(PIXELS), Image.open(file)]
    forms += [
        PIXELS,
        jnp.asarray(PIXELS),
        {"bytes": content, "path": "nowhere.png"},
        {"bytes": None, "path": str(file)},
    ]
    forms += [{"url": base, "detail": "high"}, {"image_url": {"url": str(file)}}]
    for form in forms:
        np.testing.assert_array_equal(np.asarray(pixels(form).convert("RGB")), PIXELS, err_msg=repr(form)[:80])


def test_import_takes_the_same_texts(tmp_path: Path) -> None:
    content, file = encoded(), tmp_path / "a photo.png"
    file.write_bytes(content)
    base = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    for form in (
        content,
        str(file),
        f"file://{str(file).replace(' ', '%20')}",
        base,
        {"bytes": content},
        {"url": base},
    ):
        assert fetch(form, tmp_path, ItemOptions()) == content


@pytest.mark.parametrize("orientation", range(1, 9))
def test_lazily_opened_files_are_turned_as_in_training(orientation: int) -> None:
    content = encoded(orientation)
    upright = open_image(content)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    assert upright.tobytes() == expected.tobytes()
    loaded = Image.open(io.BytesIO(content))
    loaded.load()
    for image in (Image.open(io.BytesIO(content)), loaded, expected):
        assert pixels(image).tobytes() == expected.tobytes()
    turned = Image.open(io.BytesIO(content))
    ImageOps.exif_transpose(turned, in_place=True)
    assert pixels(turned).tobytes() == expected.tobytes()


def test_edited_images_are_taken_as_they_are() -> None:
    photo = Image.open(io.BytesIO(encoded(6)))
    for edited in (photo.convert("L"), photo.copy(), photo.resize((3, 2)), photo.rotate(90, expand=True)):
        assert pixels(edited) is edited


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("https://example.org/a.png", r"image 0 is at https://example\.org/a\.png, which is not fetched: download it"),
        ("s3://bucket/" + "a" * 300, r"image 0 is at s3://bucket/a+ … a+, which is not fetched"),
        ("data:image/png", "image 0 is a data URI without content"),
        ("data:image/png;base64,!!", "image 0 is a data URI that cannot be decoded"),
        (b"", r"image 0 is empty"),
        (b"text", "image 0 is not an image of a known format"),
        (io.StringIO("text"), r'image 0 is a file that was opened as text: open it with mode "rb"'),
        (io.BytesIO(), "image 0 is empty"),
        ({"size": 5}, "image 0 is given as NoneType: give a path, bytes"),
        (3.5, "image 0 is given as float"),
        (["a.png"], "image 0 is given as list"),
        (np.zeros((4, 6, 2), np.uint8), r"image 0 is an array \(4, 6, 2\) of uint8: give"),
        (np.zeros((4, 6, 3), np.int64), r"image 0 is an array \(4, 6, 3\) of int64: give"),
        (Image.open(io.BytesIO(encoded()[:-40])), "image 0 cannot be decoded"),
    ],
    ids=lambda form: form[:40] if isinstance(form, str) else type(form).__name__,
)
def test_other_forms_are_refused_by_a_sentence(form: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pixels(form, "image 0")  # type: ignore[arg-type]
