"""Decode image files: open, turn upright, and reduce any pixel mode to 8-bit RGB.

Training data contains broken, rotated, transparent and 16-bit images. All of them are handled here:

* A file that cannot be decoded is a ``ValueError`` that names it; a disk that cannot be read stays an ``OSError``.
  Callers can so distinguish a bad record (skip it) from a temporary failure (retry).
* Image files are turned by their EXIF orientation. The released processor leaves that to its caller; but people who
  wrote a question about a photo saw it upright, and boxes and "left of" are wrong on a photo lying on its side.
* Other forms of an image are in ``images/sources.py``.
* A small file can have a billion pixels. Images that would take more than ``MOST_BYTES`` are refused by their headers,
  and conversions work on strips.
* Pillow's warnings are silenced: they name no file, and damage that matters is an error.
"""

import contextlib
import functools
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from phivision_jax.io.read_json import wrong_file

MOST_BYTES = 975 * 10**6
"""Bytes that decoding an image and converting it to RGB may take."""
BYTES_PER_PIXEL = {"WEBP": 18, "AVIF": 16, "JPEG2000": 25, "TIFF": 12}
"""Most bytes that decoding takes per pixel, measured by format; other formats take 8: up to 4 as stored, 4 as RGB."""
_STRIP = 2**20  # pixels converted at once
# They run a program (EPS), or contain an image of another format whose size their header does not state.
_REFUSED = ("EPS", "ICNS", "BLP", "MIC", "FPX")
_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
_PNG = b"\x89PNG\r\n\x1a\n"
_TILE = (322, 323)  # TIFF's tags of the sides of a tile, which may be larger than the image

warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)


class ImageTooLargeError(ValueError):
    """An image of so many pixels that decoding it would take more than ``MOST_BYTES`` (a decompression bomb)."""


# glibc returns large freed blocks to the system, and the next image's pages fault in again, which takes as long as
# decoding it. It keeps blocks up to the largest size that was ever freed, at most 32 MB (mallopt(3),
# M_MMAP_THRESHOLD), so one of 31 MB is allocated and freed here; it is never touched and costs nothing.
np.empty(31 << 20, np.uint8)

_ORIENTATION_TAG = 0x0112
_TURNS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
_UPRIGHT = {orientation: Image.Transpose[turn] for orientation, turn in enumerate(_TURNS.split(), start=2)}


def open_image(source: bytes | str | Path, name: str | None = None) -> Image.Image:
    """Decode the first frame of an image, turned upright.

    Args:
      source: the bytes of an image file, or its path.
      name: the image's name in errors; default: the path, or "image".

    Returns:
      The decoded image in the file's own pixel mode (``to_rgb`` reduces it).

    Raises:
      ValueError: for bytes that are empty, not an image, or cut short; ImageTooLargeError for too many pixels.
      OSError: when the file cannot be read.
    """
    return _read(source, name, upright)


def upright(image: Image.Image) -> Image.Image:
    """The pixels of an image of which only the header is read, turned by its EXIF orientation."""
    # Before decoding: EXIF after the pixels of a PNG must not count, since image_size never reads that far.
    orientation = _orientation(image)
    image.load()
    # Loaded pixels need no file, so no copy is made: it would cost half as much as decoding.
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def image_size(source: bytes | str | Path, name: str | None = None) -> tuple[int, int]:
    """Width and height that ``open_image`` would give, from the header alone: no pixel is decoded.

    Raises:
      ValueError: for bytes that are empty or not an image; ImageTooLargeError for too many pixels.
      OSError: when the file cannot be read.
    """
    return _read(source, name, _upright_size)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    return (height, width) if _orientation(image) in (5, 6, 7, 8) else (width, height)


def image_format(content: bytes) -> str | None:
    """Pillow's name of a file's format; None for bytes that cannot be opened.

    The MPO of a camera is a JPEG followed by more images, and counts as one.
    """
    try:
        with Image.open(io.BytesIO(content), formats=_formats()) as image:
            return "JPEG" if image.format == "MPO" else image.format
    except Exception:  # decoders raise anything
        return None


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as 8-bit RGB.

    =====================  ============================================================================================
    RGB                    unchanged (the only mode that the released processor takes)
    alpha or transparency  composited on white: RGBA, LA, PA, P, L and 1 with a transparent colour. Pixels under alpha 0
                           hold whatever the editor left there, often black; charts, icons and scans are meant for paper
    L, 1, I;16             the grey in all three channels; 16 bits are scaled so that 65535 becomes 255
    I, F                   grey of 32 bits, whose files rarely state a range: integers are taken as 16 bits, others
                           as shares of white if all are in 0…1, else as 8 bits; values beyond are clipped, NaN is black
    P                      the palette's colours
    CMYK, YCbCr, HSV       Pillow's conversion; colour profiles are not applied
    =====================  ============================================================================================

    Raises:
      ValueError: for a mode that has no conversion.
    """
    if image.mode == "RGB":
        return image
    rows = max(1, _STRIP // max(1, image.width))
    boxes = [(0, top, image.width, min(top + rows, image.height)) for top in range(0, image.height, rows)]
    greys = (np.asarray(image.crop(box)) for box in boxes if image.mode == "F")
    is_share = not any(((grey < 0) | (grey > 1)).any() for grey in greys)
    if len(boxes) <= 1:
        return _strip_to_rgb(image, is_share)
    rgb = Image.new("RGB", image.size)
    for box in boxes:
        rgb.paste(_strip_to_rgb(image.crop(box), is_share), box)
    return rgb


def _strip_to_rgb(image: Image.Image, is_share: bool) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return Image.fromarray(_in_8_bits(np.asarray(image), is_share), "L").convert("RGB")
    try:
        if image.mode == "La":
            image = image.convert("LA")
        if not image.has_transparency_data:
            return image.convert("RGB")
        rgba = image.convert("RGBA")
    except ValueError as error:
        raise ValueError(f"an image of mode {image.mode!r} cannot be converted to RGB: {error}") from None
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _in_8_bits(grey: np.ndarray, is_share: bool) -> np.ndarray:
    if grey.dtype.kind != "f":  # (v + 128) // 257 is the nearest integer to v / 257
        return ((np.clip(grey, 0, 65535).astype(np.uint32) + 128) // 257).astype(np.uint8)
    grey = np.nan_to_num(grey.astype(np.float64))
    return np.rint(np.clip(grey * 255 if is_share else grey, 0, 255)).astype(np.uint8)


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in Image.ID if name not in _REFUSED)


def _read[T](source: bytes | str | Path, name: str | None, use: Callable[[Image.Image], T]) -> T:
    """Apply a function to an image of which the header is read."""
    name = name or ("image" if isinstance(source, bytes) else str(source))
    try:
        with _opened(source, name) as image:
            return use(image)
    except ValueError as error:
        content = source if isinstance(source, bytes) else Path(source).read_bytes()
        if isinstance(error, ImageTooLargeError) or (shorter := _without_texts(content)) == content:
            raise
    return _read(shorter, name, use)


def _without_texts(content: bytes) -> bytes:
    """A PNG without texts and profile, which have no effect on pixels but fail above limits of Pillow's.

    EXIF written as a text, which may have the orientation, is kept if it precedes the pixels.
    """
    if not content.startswith(_PNG):
        return content
    pieces, offset, begun = [_PNG], len(_PNG), False
    while offset < len(content):
        kind, end = content[offset + 4 : offset + 8], offset + 12 + int.from_bytes(content[offset : offset + 4])
        begun = begun or kind == b"IDAT"
        if kind not in _TEXTS or (not begun and content.startswith(b"Raw profile type exif", offset + 8)):
            pieces.append(content[offset:end])
        offset = end
    return b"".join(pieces)


@contextlib.contextmanager
def _opened(source: bytes | str | Path, name: str) -> Iterator[Image.Image]:
    """The image with its header read; whatever its decoder raises inside the block becomes a ValueError with a name."""
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
        if not file.read(1):
            raise ValueError(f"{name} is empty (0 bytes)")
        file.seek(0)
        try:
            with Image.open(file, formats=_formats()) as image:
                _check_size(image)
                yield image
        except Image.UnidentifiedImageError:
            file.seek(0)
            known = wrong_file(file.read(512)) or "is not an image of a known format, or its header is broken"
            raise ValueError(f"{name} {known}") from None
        except Image.DecompressionBombError as error:
            raise ImageTooLargeError(f"{name} is too large to decode: {str(error).partition(', could')[0]}") from None
        except Exception as error:
            # Decoders raise anything: SyntaxError, struct.error, EOFError, OSError without a number...
            if isinstance(error, MemoryError) or getattr(error, "errno", None) is not None:
                raise
            raise ValueError(f"{name} cannot be decoded: {error}") from error


def _check_size(image: Image.Image) -> None:
    width, height = image.size
    if image.format == "TIFF":
        columns, rows = (image.tag_v2.get(tag, 0) for tag in _TILE)  # type: ignore[attr-defined]
        width, height = max(width, columns), max(height, rows)
    if width * height * BYTES_PER_PIXEL.get(image.format or "", 8) > MOST_BYTES:
        problem = f"{image.format} of {width:,} x {height:,} pixels takes more than {MOST_BYTES:,} bytes"
        raise Image.DecompressionBombError(problem)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation of an image of which only the header is read; 1 is upright."""
    if image.format == "TIFF":
        return 1  # Pillow turns TIFF itself, its size included.
    try:
        # The base class's method: PngImageFile.getexif would decode all pixels to look behind them.
        return int(Image.Image.getexif(image).get(_ORIENTATION_TAG, 1))
    except Exception:
        return 1  # Unreadable EXIF; the pixels may well be sound.
