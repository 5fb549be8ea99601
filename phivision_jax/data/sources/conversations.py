"""The forms in which data sets write a conversation, as messages whose contents are strings with ``<image>`` in them.

    conversations  [{"from": "human" | "user" | "gpt" | "assistant" | "system", "value": "…<image>…"}, …]      LLaVA
    messages       [{"role": "user" | "assistant" | "system", "content": "…<image>…"}, …]      OpenAI, Hugging Face, TRL
                   or with a list of parts for a content, as ``text.chat`` takes them, joined in the same way:
                     {"type": "text", "text": "…"}
                     {"type": "image"}, the image under "image", "path", "url" or "bytes", or else the next of "images"
                     {"type": "image_url", "image_url": {"url": "…"}}, or the string itself
    texts          [{"user": "…", "assistant": "…"}, …]                                              The Cauldron
    question       "…", and an "answer" or the first of "answers"

A list of dicts may also be a dict of lists, as Hugging Face's and TFDS's Sequence keep it. An answer in the first two
forms may have a ``weight``, as OpenAI's have: 0, which is kept, is not learned, 1 is as good as none. What else a turn
holds (tool calls) is not kept. In the last two forms images without any ``<image>`` stand before the first question.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from phivision_jax.data.quarantine import BadRecord
from phivision_jax.text.constants import IMAGE_MARKER

FORMS = ("conversations", "messages", "texts", "question")
"""The fields by which a form is recognised; where an item has several, the first."""
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


class _Next:
    """Stands for an image that is not given at its place: the next of the item's images."""


NEXT = _Next()


@dataclasses.dataclass
class Conversation:
    messages: list[dict[str, Any]]
    images: list[Any]
    """For each ``<image>`` in the messages, in order: the image given there, or ``NEXT``."""
    used: tuple[str, ...]
    """The item's fields of which it was made."""
    may_prepend: bool
    """Images without a marker belong before the first question."""


def conversation_of(item: Mapping[str, Any]) -> Conversation:
    """The conversation in an item.

    Raises:
      BadRecord: "fields" or "role".
    """
    form = next((form for form in FORMS if item.get(form) is not None), None)
    if form is None:
        raise BadRecord("fields", f"no conversation: none of the fields {', '.join(FORMS)} is there{_instead(item)}")
    images: list[Any] = []
    if form == "question":
        used: tuple[str, ...] = ("question", "answer")
        answer = item.get("answer")
        if answer is None:
            used = ("question", "answers")
            answers = item.get("answers")
            answer = answers[0] if isinstance(answers, list) and answers else answers
        messages = [
            {"role": "user", "content": _text(item["question"], "the question")},
            {"role": "assistant", "content": _text(answer, "the answer")},
        ]
        images = [NEXT] * sum(message["content"].count(IMAGE_MARKER) for message in messages)
        return Conversation(messages, images, used, may_prepend=True)
    messages = []
    for i, turn in enumerate(_rows(item[form], f"the field {form}")):
        if form == "texts":
            for role in ("user", "assistant"):
                messages.append({"role": role, "content": _text(turn.get(role), f"texts {i}: {role}")})
                images += [NEXT] * messages[-1]["content"].count(IMAGE_MARKER)
        else:
            messages.append(_message(turn, i, images))
    return Conversation(messages, images, (form,), may_prepend=form == "texts")


def _instead(item: Mapping[str, Any]) -> str:
    """What an item without a conversation has: a name to rename, or a list of the true items."""
    for name, value in item.items():
        if isinstance(value, list) and value and _all_mappings(value) and any(form in value[0] for form in FORMS):
            return f"; if the {len(value):,} objects under {name!r} are the items, make a file of that list alone"
    names = [str(name)[:40] for name, value in item.items() if value is not None]
    return f", only {', '.join(names[:8])}{' …' if len(names) > 8 else ''} (--rename theirs=ours)" if names else ""


def _message(turn: Mapping[str, Any], i: int, images: list[Any]) -> dict[str, Any]:
    """One turn in LLaVA's or OpenAI's words; the images of its content are appended to ``images``."""
    says = next((name for name in ("from", "role") if turn.get(name) is not None), None)
    holds = next((name for name in ("value", "content") if turn.get(name) is not None), None)
    if says is None or holds is None:
        raise BadRecord("fields", f"message {i} lacks a role (role, from) or a content (content, value)")
    role = turn[says]
    if not isinstance(role, str):
        raise BadRecord("fields", f"message {i}: its role is {type(role).__name__}, not a string")
    if role not in _ROLES:
        raise BadRecord("role", f"message {i} has role {role!r}: it must be one of {', '.join(_ROLES)}")
    weight = turn.get("weight") if _ROLES[role] == "assistant" else None
    if weight not in (None, 0, 1):
        raise BadRecord("fields", f"message {i}: its weight is {weight!r}: it must be 0 (not learned) or 1")
    kept = {"weight": 0} if weight == 0 else {}
    content = turn[holds]
    if isinstance(content, str):
        images += [NEXT] * content.count(IMAGE_MARKER)
        return {"role": _ROLES[role], "content": content, **kept}
    texts = []
    for part in _rows(content, f"the content of message {i}"):
        kind = part.get("type")
        if kind == "text":
            texts.append(_text(part.get("text"), f"message {i}: a part's text"))
            images += [NEXT] * texts[-1].count(IMAGE_MARKER)
        elif kind in ("image", "image_url"):
            # As text.chat.flatten writes it.
            texts.append(IMAGE_MARKER + "\n")
            images.append(_image_of(part, images, i))
        else:
            raise BadRecord("fields", f"message {i}: a part of type {kind!r}: known are text, image and image_url")
    return {"role": _ROLES[role], "content": "".join(texts), **kept}


def _image_of(part: Mapping[str, Any], images: list[Any], i: int) -> Any:
    if part["type"] == "image_url":
        value = part.get("image_url")
        if value is None:
            raise BadRecord("fields", f"message {i}: a part of type image_url without one")
        return value
    given = next((name for name in ("image", "bytes", "path", "url") if part.get(name) is not None), None)
    if given is not None:
        return part[given]
    # Some sets number the images; in another order than they are listed they would be given to the wrong places.
    number = part.get("index")
    if isinstance(number, int) and number != (expected := sum(image is NEXT for image in images)):
        raise BadRecord("fields", f"message {i} shows image {number} where image {expected} is the next in order")
    return NEXT


def _rows(value: Any, what: str) -> list[Mapping[str, Any]]:
    """A list of dicts, which may come as a dict of lists."""
    if isinstance(value, Mapping):
        if not all(isinstance(column, list) for column in value.values()):
            raise BadRecord("fields", f"{what} is a dict, not a list")
        if len({len(column) for column in value.values()}) > 1:
            raise BadRecord("fields", f"{what} is a dict of lists of different lengths")
        return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    if not isinstance(value, list) or not _all_mappings(value):
        raise BadRecord("fields", f"{what} is {type(value).__name__}: it must be a list of dicts")
    return value


def _all_mappings(values: Iterable[Any]) -> bool:
    return all(isinstance(value, Mapping) for value in values)


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise BadRecord("fields", f"{what} is missing" if value is None else f"{what} is {type(value).__name__}")
    return value
