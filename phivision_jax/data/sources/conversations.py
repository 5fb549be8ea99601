"""The forms in which data sets write a conversation, read as messages whose contents are strings with ``<image>``.

    conversations  [{"from": "human" | "user" | "gpt" | "assistant" | "system", "value": "…<image>…"}, …]      LLaVA
    messages       [{"role": "user" | "assistant" | "system", "content": "…<image>…"}, …]      OpenAI, Hugging Face, TRL
                   or with a list of parts as content, joined as ``text.chat`` joins them:
                     {"type": "text", "text": "…"}
                     {"type": "image"}, the image under "image", "bytes", "path" or "url", or else the next of "images"
                     {"type": "image_url", "image_url": {"url": "…"}}, or the string itself
    texts          [{"user": "…", "assistant": "…"}, …]                                              The Cauldron
    question       "…", and an "answer" or the first of "answers"

A list of dicts may also be a dict of lists, as Hugging Face and TFDS store a Sequence. An answer in the first two
forms may have a ``weight``, as OpenAI's have: 0 excludes it from the loss, 1 is the same as none. Other fields of a
turn, such as tool calls, are dropped. In the last two forms images without any ``<image>`` come before the first
question.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from phivision_jax.data.quarantine import BadRecord
from phivision_jax.text import chat

FORMS = ("conversations", "messages", "texts", "question")
"""The fields by which a form is recognised; of several, the first counts."""
_ROLES = {"human": "user", "gpt": "assistant"}
_ROLE, _CONTENT, _IMAGE = ("from", "role"), ("value", "content"), ("image", "bytes", "path", "url")
"""Keys of a turn, and of a part of type image; of several, the first that is not null counts."""


@dataclasses.dataclass(frozen=True)
class _Index:
    """Placeholder for the image of a part that only gives its number."""

    number: int


@dataclasses.dataclass
class Conversation:
    messages: list[dict[str, Any]]
    images: list[Any]
    """For each ``<image>`` in the messages, in order: the image given there; None: the next of the item's images."""
    used: tuple[str, ...]
    """The item's fields that it was made of."""
    may_prepend: bool
    """Images without a marker come before the first question."""


def conversation_of(item: Mapping[str, Any]) -> Conversation:
    """The conversation in an item.

    Raises:
      BadRecord: "fields" or "role".
    """
    form = next((form for form in FORMS if item.get(form) is not None), None)
    if form is None:
        raise BadRecord("fields", f"no conversation: it has none of the fields {', '.join(FORMS)}{_hint(item)}")
    used: tuple[str, ...] = (form,)
    if form == "question":
        used = ("question", "answers" if item.get("answer") is None else "answer")
        answer = item.get(used[1])
        if isinstance(answer, list):
            answer = answer[0] if answer else None
        turns: list[Mapping[str, Any]] = [{"user": item["question"], "assistant": answer}]
    else:
        turns = _rows(item[form], f"the field {form}")
    by_role = form in ("question", "texts")
    if by_role:
        messages = [{"role": role, "content": turn.get(role)} for turn in turns for role in ("user", "assistant")]
    else:
        messages = [_message(turn, i) for i, turn in enumerate(turns)]
    try:
        plain, images = chat.flatten(messages)
    except chat.MessageError as error:
        raise BadRecord(error.reason, str(error)) from None
    return Conversation(plain, _checked(images), used, may_prepend=by_role)


def _hint(item: Mapping[str, Any]) -> str:
    """The parts of an item that may be meant as a conversation: a list of the real items, or fields to rename."""
    for name, value in item.items():
        if isinstance(value, list) and value and isinstance(value[0], Mapping) and value[0].keys() & {*FORMS}:
            return f"; if the {len(value):,} objects under {name!r} are the items, make a file of that list alone"
    names = [str(name)[:40] for name, value in item.items() if value is not None]
    return f", only {', '.join(names[:8])}{' …' if len(names) > 8 else ''} (--rename theirs=ours)" if names else ""


def _message(turn: Mapping[str, Any], i: int) -> dict[str, Any]:
    """A turn of LLaVA or OpenAI as ``text.chat`` takes it."""
    role, content = _first(turn, _ROLE), _first(turn, _CONTENT)
    if not isinstance(role, str) or content is None:
        raise BadRecord("fields", f"message {i} lacks a role (role, from) or a content (content, value)")
    role = _ROLES.get(role, role)
    if not isinstance(content, str):
        content = [_part(part) for part in _rows(content, f"the content of message {i}")]
    weight = turn.get("weight") if role == "assistant" else None
    return {"role": role, "content": content} | ({} if weight in (None, 1) else {"weight": weight})


def _first(fields: Mapping[str, Any], names: Iterable[str]) -> Any:
    return next((fields[name] for name in names if fields.get(name) is not None), None)


def _part(part: Mapping[str, Any]) -> Mapping[str, Any]:
    kind, image = part.get("type"), None
    if kind == "image":
        image = _first(part, _IMAGE)
        if image is None and isinstance(part.get("index"), int):
            image = _Index(part["index"])
    elif kind == "image_url":
        image = part.get("image_url")
    return {"type": "image", "image": image} if kind == "image" or image is not None else part


def _checked(images: list[Any]) -> list[Any]:
    """The images, those that are only numbered as None, if their numbers are in order."""
    listed = [image for image in images if image is None or isinstance(image, _Index)]
    for expected, image in enumerate(listed):
        # In another order than they are listed, images would be assigned to the wrong places.
        if image is not None and image.number != expected:
            raise BadRecord("fields", f"a part shows image {image.number} where image {expected} is next in order")
    return [None if isinstance(image, _Index) else image for image in images]


def _rows(value: Any, what: str) -> list[Mapping[str, Any]]:
    """A list of dicts, which may come as a dict of lists."""
    if isinstance(value, Mapping):
        if not all(isinstance(column, list) for column in value.values()):
            raise BadRecord("fields", f"{what} is a dict, not a list")
        if len({len(column) for column in value.values()}) > 1:
            raise BadRecord("fields", f"{what} is a dict of lists of different lengths")
        return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    if not isinstance(value, list) or not all(isinstance(row, Mapping) for row in value):
        raise BadRecord("fields", f"{what} is {type(value).__name__}: it must be a list of dicts")
    return value
