"""Decode image files: open, turn upright, and reduce any pixel mode to 8-bit RGB.

Training data contains broken, rotated, transparent and 16-bit images. All of them are handled here:

* A file that cannot be decoded is a ``ValueError`` that names it; a disk that cannot be read stays an ``OSError``.
  Callers can so distinguish a bad record (skip it) from a temporary failure (retry).
* Image files are turned by their EXIF orientation. The released processor leaves that to its caller; but people who
  wrote a question about a photo saw it upright, and boxes and "left of" are wrong on a photo lying on its side.
* Other forms of an image are in ``images/sources.py``.
"""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from phivision_jax.io.read_json import wrong_file


class ImageTooLargeError(ValueError):
    """An image of more pixels than Pillow agrees to decode (a decompression bomb)."""


# glibc returns large freed blocks to the system, and the next image's pages fault in again, which takes as long as
# decoding it. It keeps blocks up to the largest size that was ever freed, at most 32 MB (mallopt(3),
# M_MMAP_THRESHOLD), so one of 31 MB is allocated and freed here; it is never touched and costs nothing.
np.empty(31 << 20, np.uint8)

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDES_SWAP = (5, 6, 7, 8)


def open_image(source: bytes | str | Path, name: str | None = None) -> Image.Image:
    """Decode the first frame of an image, turned upright.

    Args:
      source: the bytes of an image file, or its path.
      name: the image's name in errors; default: the path, or "image".

    Returns:
      The decoded image in the file's own pixel mode (``to_rgb`` reduces it).

    Raises:
      ValueError: for bytes that are empty, not an image, cut short, or larger than Pillow agrees to decode.
      OSError: when the file cannot be read.
    """
    with _opened(source, name) as image:
        # Loaded pixels need no file, so no copy is made: it would cost half as much as decoding.
        return upright(image)


def upright(image: Image.Image) -> Image.Image:
    """The pixels of an image of which only the header is read, turned by its EXIF orientation."""
    # Before decoding: EXIF after the pixels of a PNG must not count, since image_size never reads that far.
    orientation = _orientation(image)
    image.load()
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def image_size(source: bytes | str | Path, name: str | None = None) -> tuple[int, int]:
    """Width and height that ``open_image`` would give, from the header alone: no pixel is decoded.

    Raises:
      ValueError: for bytes that are empty, not an image, or larger than Pillow agrees to decode.
      OSError: when the file cannot be read.
    """
    with _opened(source, name) as image:
        width, height = image.size
        return (height, width) if _orientation(image) in _SIDES_SWAP else (width, height)


def image_format(content: bytes) -> str | None:
    """Pillow's name of a file's format; None for bytes that cannot be opened.

    The MPO of a camera is a JPEG followed by more images, and counts as one.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
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
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return Image.fromarray(_in_8_bits(np.asarray(image)), "L").convert("RGB")
    try:
        if image.mode == "La":
            image = image.convert("LA")
        if not image.has_transparency_data:
            return image.convert("RGB")
        rgba = image.convert("RGBA")
    except ValueError as error:
        raise ValueError(f"an image of mode {image.mode!r} cannot be converted to RGB: {error}") from None
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _in_8_bits(grey: np.ndarray) -> np.ndarray:
    if grey.dtype.kind != "f":  # (v + 128) // 257 is the nearest integer to v / 257
        return ((np.clip(grey, 0, 65535).astype(np.uint32) + 128) // 257).astype(np.uint8)
    grey = np.nan_to_num(grey.astype(np.float64))
    if grey.size and grey.min() >= 0 and grey.max() <= 1:
        grey = grey * 255
    return np.rint(np.clip(grey, 0, 255)).astype(np.uint8)


@functools.cache
def _formats() -> tuple[str, ...]:
    """The formats that Pillow reads by itself: all but EPS, which it passes to an interpreter (Ghostscript)."""
    Image.init()
    return tuple(name for name in Image.ID if name != "EPS")


@contextlib.contextmanager
def _opened(source: bytes | str | Path, name: str | None) -> Iterator[Image.Image]:
    """The image with its header read; whatever its decoder raises inside the block becomes a ValueError with a name."""
    name = name or ("image" if isinstance(source, bytes) else str(source))
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
        if not file.read(1):
            raise ValueError(f"{name} is empty (0 bytes)")
        file.seek(0)
        try:
            with Image.open(file, formats=_formats()) as image:
                yield image
        except Image.UnidentifiedImageError:
            file.seek(0)
            known = wrong_file(file.read(512)) or "is not an image of a known format, or its header is broken"
            raise ValueError(f"{name} {known}") from None
        except Image.DecompressionBombError as error:
            raise ImageTooLargeError(f"{name} is too large to decode: {error}") from None
        except MemoryError:
            raise
        except Exception as error:
            # Decoders raise anything: SyntaxError, struct.error, EOFError, OSError without a number...
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise ValueError(f"{name} cannot be decoded: {error}") from error


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation of an image of which only the header is read; 1 is upright."""
    if image.format == "TIFF":
        return 1  # Pillow turns TIFF itself, its size included.
    try:
        # The base class's method: PngImageFile.getexif would decode all pixels to look behind them.
        return int(Image.Image.getexif(image).get(_ORIENTATION_TAG, 1))
    except Exception:
        return 1  # Unreadable EXIF; the pixels may well be sound.
