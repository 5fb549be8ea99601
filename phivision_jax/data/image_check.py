"""The check of one image of a record."""

from phivision_jax.data.quarantine import BadRecord
from phivision_jax.images.decode import MOST_BYTES, ImageTooLargeError, image_size, open_image, to_rgb
from phivision_jax.io.memory import limited_memory

MAX_SIDE = 32_768
"""Pixels. A longer strip, resized to the encoder's patches, would be unrecognisable."""


def check_image(image: bytes | str, name: str, *, decode: bool = False) -> tuple[int, int]:
    """Width and height of an image in pixels, after turning it upright.

    Args:
      image: an encoded file, or its path.
      name: name of the image in messages.
      decode: also decode it and convert it to RGB, as training will; else only its header is read.

    Raises:
      BadRecord: "image-broken" or "image-size".
    """
    try:
        width, height = image_size(image, name)
        if decode and max(width, height) <= MAX_SIDE:
            with limited_memory(MOST_BYTES):  # a header may understate the size of what is decoded
                decoded = to_rgb(open_image(image, name)).size
            if decoded != (width, height):
                raise ValueError(f"{name} has {width}x{height} pixels in its header, but decodes to {decoded}")
    except ImageTooLargeError as error:
        raise BadRecord("image-size", str(error)) from None
    except MemoryError:
        raise BadRecord("image-size", f"{name} cannot be decoded: there is not enough memory for it") from None
    except (ValueError, OSError) as error:  # of bytes in memory, an OSError is the decoder's
        raise BadRecord("image-broken", str(error) if name in str(error) else f"{name}: {error}") from None
    if not 1 <= min(width, height) <= max(width, height) <= MAX_SIDE:
        reason = "image-size" if min(width, height) else "image-broken"
        raise BadRecord(reason, f"{name} has {width}x{height} pixels: a side may have from 1 to {MAX_SIDE:,}")
    return width, height
