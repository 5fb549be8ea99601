"""Opening images: conversions by hand, orientation on every format that states one, errors that name the file."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from phivision_jax.images import decode
from phivision_jax.images.decode import image_size, open_image, to_rgb
from tests.support.paths import ROOT


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def rgb_at_origin(image: Image.Image) -> tuple[int, ...]:
    rgb = to_rgb(image)
    assert rgb.mode == "RGB"
    return tuple(np.asarray(rgb)[0, 0].tolist())


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGB", (1, 2, 3), (1, 2, 3)),
        ("RGBA", (0, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (200, 100, 0, 255), (200, 100, 0)),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),  # a fifth of black on white
        ("LA", (0, 0), (255, 255, 255)),
        ("La", (0, 0), (255, 255, 255)),
        ("LA", (7, 255), (7, 7, 7)),
        ("L", 7, (7, 7, 7)),
        ("1", 1, (255, 255, 255)),
        ("I;16", 65535, (255, 255, 255)),
        ("I;16", 257 * 9, (9, 9, 9)),
        ("I;16", 257 * 9 + 128, (9, 9, 9)),
        ("I;16", 257 * 9 + 129, (10, 10, 10)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("YCbCr", (128, 128, 128), (128, 128, 128)),
    ],
)
def test_to_rgb_of_modes(mode: str, colour: Any, expected: tuple[int, ...]) -> None:
    assert rgb_at_origin(Image.new(mode, (3, 2), colour)) == expected


def test_to_rgb_of_palettes() -> None:
    image = Image.new("P", (2, 2), 1)
    image.putpalette([10, 20, 30, 40, 50, 60])
    assert rgb_at_origin(image) == (40, 50, 60)
    image.info["transparency"] = 1
    assert rgb_at_origin(image) == (255, 255, 255)


def test_to_rgb_keeps_rgb() -> None:
    image = Image.new("RGB", (2, 2), (0, 0, 0))
    image.info["transparency"] = (0, 0, 0)
    assert to_rgb(image) is image


def test_open_image_of_16_bits() -> None:
    grey = Image.fromarray(np.full((4, 5), 257 * 77, np.uint16))
    assert rgb_at_origin(open_image(encoded(grey, "PNG"))) == (77, 77, 77)


@pytest.mark.parametrize(
    ("grey", "expected"),
    [
        (np.array([[-5, 0, 257 * 77, 65535, 10**6]], np.int32), [0, 0, 77, 255, 255]),
        (np.array([[0.0, 0.2, 0.5, 1.0]], np.float32), [0, 51, 128, 255]),
        (np.array([[-1.0, 7.4, 200.0, 300.0, np.nan]], np.float32), [0, 7, 200, 255, 0]),
    ],
)
def test_to_rgb_of_32_bits(grey: np.ndarray, expected: list[int]) -> None:
    rgb = np.asarray(to_rgb(Image.fromarray(grey)))
    assert rgb[0].tolist() == [[value] * 3 for value in expected]
    # As files hold them, too.
    file = encoded(Image.fromarray(grey), "TIFF")
    assert np.array_equal(np.asarray(to_rgb(open_image(file))), rgb)


def test_open_image_runs_no_program() -> None:
    with pytest.raises(ValueError, match="not an image of a known format"):
        open_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "MPO", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_open_image_applies_orientation(format: str, orientation: int) -> None:
    """The upright image is 48x32 with a red top-left quarter; the file holds it turned the other way."""
    upright = Image.new("RGB", (48, 32), "blue")
    upright.paste("red", (0, 0, 24, 16))
    undo = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    turned = decode._UPRIGHT.get(orientation)
    stored = upright if turned is None else upright.transpose(undo.get(orientation, turned))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, format, exif=exif)
    image = open_image(data)
    assert image.size == image_size(data) == (48, 32)
    pixels = np.asarray(image.convert("RGB")).astype(int)
    assert pixels[4, 4, 0] > 200 > 50 > pixels[4, 4, 2]
    assert all(pixels[y, x, 2] > 200 > 50 > pixels[y, x, 0] for y, x in ((28, 4), (4, 44), (28, 44)))


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_image_size_with_exif_after_pixels() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    png = encoded(Image.new("RGB", (6, 4)), "PNG")
    end = png.index(b"IEND") - 4
    late = png[:end] + png_chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")) + png[end:]
    assert open_image(late).size == image_size(late)


def test_image_size_reads_header_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.effect_noise((400, 300), 50), "PNG")
    with monkeypatch.context() as patch:
        patch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("pixels were decoded"))
        assert image_size(data) == (400, 300)
    assert image_size(data[:2000]) == (400, 300)
    path = tmp_path / "noise.png"
    path.write_bytes(data)
    assert image_size(path) == image_size(str(path)) == (400, 300)
    assert open_image(path).tobytes() == open_image(data).tobytes()


def test_open_image_errors_name_file(tmp_path: Path) -> None:
    data = encoded(Image.effect_noise((64, 64), 50), "JPEG")
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b"")
    for content, reason in [
        (b"", r"is empty \(0 bytes\)"),
        (b"<html>not found</html>", "is an HTML page"),
        (data[: len(data) // 2], "cannot be decoded: .*truncated"),
        (bomb, "is too large to decode"),
    ]:
        path = tmp_path / "broken.jpg"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"^{path} {reason}"):
            open_image(path)
        with pytest.raises(ValueError, match=f"^record 7 {reason}"):
            open_image(content, "record 7")


def test_open_image_keeps_os_errors(tmp_path: Path) -> None:
    for function in (open_image, image_size):
        with pytest.raises(FileNotFoundError):
            function(tmp_path / "absent.png")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "MPO", "AVIF", "GIF", "BMP", "JPEG2000", "ICO"])
def test_open_image_closes_file(format: str, tmp_path: Path) -> None:
    frames = [Image.effect_noise((64, 48), 60).convert("RGB"), Image.new("RGB", (64, 48), "red")]
    several = {"save_all": True, "append_images": frames[1:]} if format in ("TIFF", "MPO", "GIF") else {}
    data = encoded(frames[0], format, **several)
    with Image.open(io.BytesIO(data)) as reference:
        expected = np.asarray(reference.convert("RGB"))
    path = tmp_path / "image"
    path.write_bytes(data)
    for image in (open_image(path), open_image(data)):
        path.write_bytes(b"\0" * len(data))
        for _ in range(2):
            np.testing.assert_array_equal(np.asarray(to_rgb(image)), expected)
        assert image.resize((5, 7)).size == image.copy().resize((5, 7)).size == (5, 7)


def test_open_image_takes_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert rgb_at_origin(open_image(data)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS.*git lfs pull"),
        (b"<!doctype HTML><html></html>", "an HTML page.*download the file again"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG drawing.*convert it to PNG"),
        (b"<?xml version='1.0'?>\n<!-- made by -->\n<!DOCTYPE svg>\n<svg/>", "an SVG drawing"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a HEIC or AVIF image, which is not read: convert it to PNG or JPEG"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "a HEIC or AVIF image"),
        (b"\0\0\0\x18ftypisom\0\0\0\0isomiso2", "a video or a sound"),
        (b"%PDF-1.7\n", "a PDF document"),
        (b"no image at all", "not an image of a known format, or its header is broken"),
    ],
)
def test_other_kinds_of_files_are_named(content, what):
    for read in (open_image, image_size):
        with pytest.raises(ValueError, match=f"photo is {what}"):
            read(content, "photo")


def test_texts_of_png_do_not_cost_its_pixels() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    hexadecimal = exif.tobytes().hex().encode()
    profile = b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n%8d\n" % (len(hexadecimal) // 2) + hexadecimal)
    zeros = bytes(2 * 2**20)
    texts = {b"zTXt": b"a\0\0" + zlib.compress(zeros), b"iTXt": b"a\0\1\0\0\0" + zlib.compress(zeros)}
    texts |= {b"tEXt": b"a\0" + bytes(2**26), b"iCCP": b"a\0\0" + zlib.compress(zeros)}
    png = encoded(Image.new("RGB", (6, 4), (1, 2, 3)), "PNG")
    for kind, data in texts.items():
        for place in (33, png.index(b"IEND") - 4):
            for turned in (False, True):
                start = png[:33] + (png_chunk(b"zTXt", profile) if turned else b"")
                content = start + png[33:place] + png_chunk(kind, data) + png[place:]
                image = open_image(content)
                assert image.size == image_size(content) == ((4, 6) if turned else (6, 4)), (kind, place)
                assert rgb_at_origin(image) == (1, 2, 3)
    broken = png[:33] + png_chunk(b"zTXt", texts[b"zTXt"]) + png[33:45]
    with pytest.raises(ValueError, match="cannot be decoded"):
        open_image(broken)


def test_images_of_too_many_bytes_are_refused_by_their_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "MOST_BYTES", 64 * 64 * 12)
    large = Image.new("RGB", (64, 65))
    formats = ("TIFF", "WEBP", "AVIF", "JPEG2000")
    for content in (*(encoded(large, format) for format in formats), encoded(large.resize((64, 97)), "PNG")):
        for read in (open_image, image_size):
            with pytest.raises(decode.ImageTooLargeError, match="takes more than 49,152 bytes"):
                read(content)
    assert image_size(encoded(large, "PNG")) == (64, 65)
    tile = struct.pack("<2sHIH", b"II", 42, 8, 10)
    tags = {256: 8, 257: 8, 258: 8, 259: 1, 262: 1, 277: 1, 322: 640, 323: 640, 324: 200, 325: 409_600}
    tile += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items()) + bytes(100)
    with pytest.raises(decode.ImageTooLargeError, match="640 x 640"):
        open_image(tile)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "1", "P", "CMYK", "I;16", "I", "F", "YCbCr"])
@pytest.mark.parametrize("scale", [1, 255])
def test_conversion_in_strips_is_that_of_the_whole(mode: str, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(1).random((37, 23, 4)).astype(np.float32)
    image = Image.fromarray((noise * 255).astype(np.uint8), "RGBA")
    if mode in ("F", "I", "I;16"):
        dtype = {"F": np.float32, "I": np.int32, "I;16": np.uint16}[mode]
        image = Image.fromarray(
            (noise[..., 0] * (scale if mode == "F" else 70_000 if mode == "I" else 65_535)).astype(dtype)
        )
    else:
        image = image.convert(mode) if mode in ("RGBA", "LA") else image.convert("RGB").convert(mode)
    expected = np.asarray(to_rgb(image))
    monkeypatch.setattr(decode, "_STRIP", 60)
    assert np.array_equal(np.asarray(to_rgb(image)), expected)


def test_decoding_writes_nothing_to_the_console(tmp_path: Path) -> None:
    large = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", 10_500, 10_500, 1, 0, 0, 0, 0))
    jpeg = encoded(Image.new("RGB", (8, 8)), "JPEG")
    exif = b"Exif\0\0II*\0\xff\xff\xff\xff"
    segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    (tmp_path / "0").write_bytes(
        large + png_chunk(b"IDAT", zlib.compress(bytes(1314 * 10_500))) + png_chunk(b"IEND", b"")
    )
    (tmp_path / "1").write_bytes(jpeg[:2] + segment + jpeg[2:])
    (tmp_path / "2").write_bytes(encoded(Image.new("L", (8, 8)), "TIFF").replace(b"II*", b"II*")[:-2])
    program = f"""
from pathlib import Path
from phivision_jax.images.decode import image_size, open_image
for name in "012":
    for read in (image_size, open_image):
        try:
            read(Path({str(tmp_path)!r}) / name)
        except ValueError:
            pass
"""
    done = subprocess.run([sys.executable, "-W", "always", "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
