"""Can this record be trained on, and how long is it? Asked once, at import; what is not good has a reason.

    record ──► strings ──► roles, answers, markers ──► chat.encode ──► images' headers (──► their pixels)
               encoding    fields, role, empty-answer,  control-token,  image-broken, image-size
                           image-count                  mode, too-long

Everything that shows here is kept out of the dataset, so training meets only what shows in pixels alone. Without
``decode`` no pixel is read: an import then runs at the speed of the disk.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import msgpack

from phivision_jax.data.quarantine import BadRecord, Reason
from phivision_jax.data.records import Record, mode_of
from phivision_jax.images.decode import ImageTooLargeError, image_size, open_image, to_rgb
from phivision_jax.text import chat
from phivision_jax.text.constants import IMAGE_MARKER, IMAGE_TOKEN, ROLES
from phivision_jax.text.tokenizer import END_THINK, NOTHINK, THINK

if TYPE_CHECKING:
    from phivision_jax.processor import Processor

MAX_SIDE = 32_768
"""Pixels. A longer strip, squeezed into the encoder's patches, leaves nothing to be seen."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """What the index holds of a record."""

    text_tokens: int
    """Tokens of the conversation, images not counted."""
    image_sizes: tuple[tuple[int, int], ...]
    """Width and height in pixels, as the picture is seen (turned upright)."""


def measure(record: Record, processor: Processor, *, decode: bool) -> Measured:
    """The lengths of a record that can be trained on.

    Args:
      record: images as bytes or paths.
      processor: its tokenizer and template count; its ``config.decoder.max_positions`` limits.
      decode: also decode every image and convert it to RGB, as training will.

    Raises:
      BadRecord: with the reason, for a record that cannot be trained on, whatever its bytes.
      OSError: when the file of an image that is given as a path cannot be read.
      ValueError: when the template marks no assistant text: no record could be trained on.
    """
    _check_storable(record)
    text_tokens = count_text_tokens(record, processor)
    return Measured(text_tokens, measure_images(record, decode=decode))


def measure_images(record: Record, *, decode: bool) -> tuple[tuple[int, int], ...]:
    """Width and height of each image: the part of ``measure`` that needs no processor, and raises as it does."""
    return tuple(_measure_image(image, k, decode) for k, image in enumerate(record.images))


def with_bytes(record: Record) -> Record:
    """The record with its images as bytes, whatever paths they stand at.

    Raises:
      BadRecord: when there is no such file.
      OSError: when it cannot be read.
    """
    if not any(isinstance(image, str) for image in record.images):
        return record
    try:
        images = tuple(Path(image).read_bytes() if isinstance(image, str) else image for image in record.images)
    except FileNotFoundError as error:
        raise BadRecord("image-missing", f"there is no file {error.filename}") from None
    return dataclasses.replace(record, images=images)


def count_text_tokens(record: Record, processor: Processor) -> int:
    """Tokens of the conversation, image columns not counted; no image is opened.

    Raises:
      BadRecord: for messages that cannot be encoded or teach nothing, or not as many markers as images.
    """
    _check_messages(record)
    longest = processor.config.decoder.max_positions
    # Tokenising megabytes only to refuse them would let one record stop an import for minutes. White space at the ends
    # is not counted, since control tokens may swallow it.
    fewest = sum(len(m["content"].strip()) for m in record.messages) // processor.tokenizer.longest_token
    if fewest > longest:
        raise BadRecord("too-long", f"the text has at least {fewest:,} tokens, the model has {longest:,} positions")
    try:
        ids, _ = chat.encode(processor.tokenizer, processor.template, record.messages, mode=mode_of(record))
    except chat.MessageError as error:
        raise BadRecord(error.reason, str(error)) from None
    except chat.UnmarkedTemplateError:
        raise
    except ValueError as error:
        raise BadRecord("fields", f"the messages do not suit the chat template: {error}") from None
    markers = ids.count(IMAGE_TOKEN)
    if markers != len(record.images):
        raise BadRecord("image-count", "the chat template drops a message in which an image stands")
    if len(ids) - markers > longest:
        raise BadRecord("too-long", f"the text has {len(ids) - markers:,} tokens, the model has {longest:,} positions")
    return len(ids) - markers


def _check_storable(record: Record) -> None:
    """Refuse what would not come back as it is: the texts of messages are looked at by themselves."""
    for name, text in (("id", record.id), ("source", record.source)):
        _check_unicode(f"the {name}", text)
    beside = [{k: v for k, v in m.items() if k not in ("role", "content")} for m in record.messages if len(m) > 2]
    if not record.metadata and not beside:
        return
    try:
        msgpack.unpackb(msgpack.packb([dict(record.metadata), beside]))
    except UnicodeError as error:
        raise BadRecord("encoding", f"the metadata is not Unicode text: {error}") from None
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        # Keys that are not strings, dates, numbers beyond 64 bits, hundreds of levels.
        raise BadRecord("fields", f"the metadata cannot be stored: {error}") from None


def _check_messages(record: Record) -> None:
    markers = answers = learned = 0
    for i, message in enumerate(record.messages):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise BadRecord("role", f"message {i} has role {role!r}: it must be one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise BadRecord("fields", f"message {i}: its content is {type(content).__name__}, not text")
        _check_unicode(f"message {i}", content)
        markers += content.count(IMAGE_MARKER)
        if role == "assistant":
            answers += 1
            learned += message.get("weight") != 0
            if not _said(content):
                raise BadRecord("empty-answer", f"message {i}: the answer says nothing")
    if not answers:
        raise BadRecord("empty-answer", "no message is the assistant's")
    if not learned:
        raise BadRecord("empty-answer", "every answer has weight 0: there is nothing to learn")
    if markers != len(record.images):
        raise BadRecord(
            "image-count", f"{markers} {IMAGE_MARKER} markers in the messages, but {len(record.images)} images"
        )


def _said(content: str) -> str:
    """An answer without mode tag, thoughts and images. Thoughts that never end are an error of mode, not silence."""
    content = content.removeprefix(NOTHINK)
    if content.startswith(THINK) and END_THINK in content:
        content = content.partition(END_THINK)[2]
    return content.replace(IMAGE_MARKER, "").strip()


def _check_unicode(what: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRecord("encoding", f"{what} is not Unicode text: {error.reason} at character {error.start}") from None


def _measure_image(image: bytes | str, k: int, decode: bool) -> tuple[int, int]:
    name = f"image {k}"

    def bad(reason: Reason, detail: str) -> NoReturn:
        raise BadRecord(reason, detail) from None

    try:
        width, height = image_size(image, name)
        if max(width, height) > MAX_SIDE:
            bad("image-size", f"{name} has {width}x{height} pixels: a side may have {MAX_SIDE:,}")
        if min(width, height) < 1:
            bad("image-broken", f"{name} has {width}x{height} pixels")
        if decode:
            pixels = to_rgb(open_image(image, name))
            if pixels.size != (width, height):
                bad("image-broken", f"{name}: its header says {width}x{height}, its pixels {pixels.size}")
    except BadRecord:
        raise
    except ImageTooLargeError as error:
        bad("image-size", str(error))
    except MemoryError:
        bad("image-size", f"{name} cannot be decoded: there is not enough memory for it")
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) and isinstance(image, str):
            raise  # The file's; of bytes in memory it is the decoder's.
        bad("image-broken", str(error) if name in str(error) else f"{name}: {error}")
    return width, height
