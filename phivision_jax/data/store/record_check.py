"""The check of records at import: whatever cannot be trained on is rejected with a reason.

    record ──► strings ──► roles, answers, markers ──► images' headers (──► their pixels) ──► chat.encode
               encoding    fields, role, empty-answer,  image-broken, image-size              control-token,
                           image-count                                                        mode, too-long
               └──────────── check_record: needs no processor ────────────┘   └─ count_text_tokens ─┘

So training finds no bad records but those whose pixels are broken. Without ``decode`` no pixel is read, and an import
is as fast as the disk.
"""

from typing import Any

import msgpack

from phivision_jax.data.image_check import check_image
from phivision_jax.data.quarantine import BadRecord
from phivision_jax.data.records import Record, mode_of
from phivision_jax.processor import Processor
from phivision_jax.text import chat
from phivision_jax.text.constants import IMAGE_MARKER, IMAGE_TOKEN
from phivision_jax.text.tokenizer import END_THINK, NOTHINK, THINK

type ImageSizes = tuple[tuple[int, int], ...]
"""Width and height of each image in pixels, after turning it upright."""


def check_record(record: Record, *, decode: bool) -> ImageSizes:
    """Check strings, metadata, messages and images.

    Args:
      record: any record, its images as bytes.
      decode: also decode every image and convert it to RGB, as training will.

    Returns:
      the sizes of its images.

    Raises:
      BadRecord: when it cannot be stored or trained on.
    """
    _check_storable(record)
    _check_messages(record)
    return tuple(check_image(image, f"image {k}", decode=decode) for k, image in enumerate(record.images))


def count_text_tokens(record: Record, processor: Processor) -> int:
    """Tokens of a checked record's conversation without its images.

    Args:
      record: see ``check_record``; its images are not opened.
      processor: its tokenizer and template count, ``config.decoder.max_positions`` is the limit.

    Raises:
      BadRecord: for messages that cannot be encoded or are too long.
      UnmarkedTemplateError: when the template marks no assistant text, whatever the record.
    """
    longest = processor.config.decoder.max_positions
    # Tokenizing megabytes only to reject them would let one record delay an import by minutes. White space at the ends
    # is not counted, since control tokens may absorb it.
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
        raise BadRecord("fields", f"the chat template cannot render the messages: {error!s:.100}") from None
    markers = ids.count(IMAGE_TOKEN)
    if markers != len(record.images):
        raise BadRecord("image-count", "the chat template drops a message that has an image")
    if len(ids) - markers > longest:
        raise BadRecord("too-long", f"the text has {len(ids) - markers:,} tokens, the model has {longest:,} positions")
    return len(ids) - markers


def _check_storable(record: Record) -> None:
    """Reject strings and metadata that msgpack would not give back."""
    parts: dict[str, Any] = {f"the {name}": getattr(record, name) for name in ("id", "source", "lineage", "metadata")}
    for name, part in (parts | {f"message {i}": message for i, message in enumerate(record.messages)}).items():
        try:
            msgpack.unpackb(msgpack.packb(part))
        except UnicodeEncodeError as error:
            problem = f"{name} is not Unicode text: {error.reason} at character {error.start}"
            raise BadRecord("encoding", problem) from None
        except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
            # Keys that are not strings, dates, numbers beyond 64 bits, hundreds of levels.
            raise BadRecord("fields", f"{name} cannot be stored: {error!s:.100}") from None


def _check_messages(record: Record) -> None:
    try:
        chat.flatten(record.messages)
    except chat.MessageError as error:
        raise BadRecord(error.reason, str(error)) from None
    markers, weights = 0, []
    for i, message in enumerate(record.messages):
        content = message["content"]
        if not isinstance(content, str):
            raise BadRecord("fields", f"message {i}: its content is {type(content).__name__}, not text")
        markers += content.count(IMAGE_MARKER)
        if message["role"] == "assistant":
            weights.append(message.get("weight"))
            if not _answer_text(content):
                raise BadRecord("empty-answer", f"message {i}: the answer has no text")
    if all(weight == 0 for weight in weights):
        problem = "every answer has weight 0" if weights else "there is no assistant message"
        raise BadRecord("empty-answer", f"{problem}: there is nothing to learn")
    if markers != len(record.images):
        raise BadRecord("image-count", f"{markers} {IMAGE_MARKER} markers, but {len(record.images)} images")


def _answer_text(content: str) -> str:
    """An answer without mode tag, thoughts and images. Unfinished thoughts are kept: ``chat.encode`` rejects them."""
    content = content.removeprefix(NOTHINK)
    answer = content.partition(END_THINK)[2] if content.startswith(THINK) and END_THINK in content else content
    return answer.replace(IMAGE_MARKER, "").strip()
