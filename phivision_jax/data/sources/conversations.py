"""The forms in which data sets write a conversation, read as messages whose contents are strings with ``<image>``.

    conversations  [{"from": "human" | "user" | "gpt" | "assistant" | "system", "value": "…<image>…"}, …]      LLaVA
    messages       [{"role": "user" | "assistant" | "system", "content": "…<image>…"}, …]      OpenAI, Hugging Face, TRL
                   or with a list of parts as content, joined as ``text.chat`` joins them:
                     {"type": "text", "text": "…"}
                     {"type": "image"}, the image under "image", "bytes", "path" or "url", or else the next of "images"
                     {"type": "image_url", "image_url": {"url": "…"}}, or the string itself
    texts          [{"user": "…", "assistant": "…"}, …]                                              The Cauldron
    question       "…", and an "answer" or the first of "answers"

A list of dicts may also be a dict of lists, as Hugging Face and TFDS store a Sequence. Numbers are texts. Roles are
compared without case, and "developer" is "system". An answer in the first two forms may have a flag of ``keys.FLAGS``
(``weight`` 0 excludes it from the loss) and thoughts in a field of their own. A system message may also be a field of
the record (``keys.SYSTEM``). In the last two forms images without any ``<image>`` come before the first question. In
the last form ``options`` or ``choices`` follow the question, a line "A. …" for each, unless the question has them.
"""

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from phivision_jax.data.quarantine import BadRecord
from phivision_jax.data.sources import keys
from phivision_jax.images.sources import IMAGE_KEYS
from phivision_jax.text import chat
from phivision_jax.text.constants import ROLES, THOUGHT_KEYS

FORMS = ("conversations", "messages", "texts", "question")
"""The fields by which a form is recognised; of several, the first counts."""
_ROLES = {
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "model", "bot", "chatbot", "ai"), "assistant"),
    **{"developer": "system", **{role: role for role in ROLES}},
}
_TOOL_ROLES = ("tool", "function", "observation", "function_call", "tool_call", "tool_response", "ipython")
_PLAIN = {"from", "role", "value", "content"}
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class _Index(int):
    """Placeholder for the image of a part that only gives its number."""


class Conversation(NamedTuple):
    messages: list[dict[str, Any]]
    images: list[Any]
    """For each ``<image>`` in the messages, in order: the image given there; None: the next of the item's images."""
    used: tuple[str, ...]
    """The item's fields that it was made of."""
    may_prepend: bool
    """Images without a marker come before the first question."""
    unread: list[tuple[str, Any]]
    """Names and values of the keys of messages and parts that are neither understood nor harmless."""


def conversation_of(item: Mapping[str, Any], renames: Mapping[str, str] = MappingProxyType({})) -> Conversation:
    """The conversation in an item.

    Args:
      item: with its fields renamed.
      renames: new names of roles, and of keys of messages and parts.

    Raises:
      BadRecord, chat.MessageError: "fields", "role", "mode" or "unread".
    """
    forms = [form for form in FORMS if item.get(form) is not None and item[form] != []]
    if not forms:
        raise BadRecord("fields", f"no conversation: it has none of the fields {', '.join(FORMS)}{_hint(item)}")
    form = forms[0]
    if len(forms) > 1 and forms[1] != "question":
        remedy = f"--rename {forms[1]}=dataset_{forms[1]} reads {form}"
        raise BadRecord("fields", f"it has both {form} and {forms[1]}: {remedy}")
    used: tuple[str, ...] = (form,)
    by_role, messages, unread = form in ("question", "texts"), [], list[tuple[str, Any]]()
    if form == "question":
        used = ("question", "answers" if item.get("answer") is None else "answer")
        answer = item.get(used[1])
        answer = next(iter(answer), None) if isinstance(answer, list) else answer
        turns: list[Mapping[str, Any]] = [{"user": item["question"], "assistant": answer}]
    else:
        turns = _rows(item[form], f"the field {form}")
    for i, turn in enumerate(turns):
        if by_role:
            turn = keys.renamed(turn, renames, "turn")
            unread += keys.unread("turn", turn, f"turn {i}: ")
            given = [role for role in ROLES if role != "system" or not keys.is_blank(turn.get(role))]
            messages += [{"role": role, "content": _text(turn.get(role))} for role in given]
        else:
            messages.append(_message(turn, i, renames, unread))
    if not keys.SPECIAL.isdisjoint(item):
        _add_options(messages, item)
        _add_system(messages, item)
        _add_thoughts(messages, item)
    plain, images = chat.flatten(messages)
    for i, message in enumerate(plain):
        keys.check_text(message["content"], f"message {i}")
    return Conversation(plain, _checked(images), used, may_prepend=by_role, unread=unread)


def _text(value: Any) -> Any:
    """A number as text; anything else as it is, and NaN as null."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return None if value != value else str(value)
    return value


def _add_system(messages: list[dict[str, Any]], item: Mapping[str, Any]) -> None:
    """Put the record's own system message before the others, unless they have the same."""
    given = {name: item[name] for name in keys.SYSTEM if not keys.is_blank(item.get(name))}
    inside = [message["content"] for message in messages if message["role"] == "system"]
    for name, text in given.items():
        if not isinstance(text, str) or any(other != text for other in [*given.values(), *inside[:1]]):
            problem = "another system message" if isinstance(text, str) else "not a text"
            raise BadRecord("fields", f"the field {name} is {problem}; {keys.or_keep(name)}")
    if given and not inside:
        messages.insert(0, {"role": "system", "content": next(iter(given.values()))})


def _add_thoughts(messages: list[dict[str, Any]], item: Mapping[str, Any]) -> None:
    """Give thoughts that are a field of the record to its only answer."""
    answers = [message for message in messages if message["role"] == "assistant"]
    for name in THOUGHT_KEYS:
        if not keys.is_blank(item.get(name)):
            if len(answers) != 1 or name in answers[0]:
                problem = f"the field {name} has thoughts, but it is unclear of which of {len(answers)} answers"
                raise BadRecord("fields", f"{problem}: write them into the messages; {keys.or_keep(name)}")
            answers[0][name] = item[name]


def _add_options(messages: Sequence[dict[str, Any]], item: Mapping[str, Any]) -> None:
    """Add a line for each of the record's options to its only question, unless it has them all."""
    name = next((name for name in keys.OPTIONS if not keys.is_blank(item.get(name))), None)
    if name is None:
        return
    texts = [*map(_text, item[name])] if isinstance(item[name], list) else []
    if not (0 < len(texts) <= len(_LETTERS) and all(isinstance(text, str) for text in texts)):
        raise BadRecord("fields", f"the field {name} must be a list of up to 26 texts; {keys.or_keep(name)}")
    asked, answers = ([m["content"] for m in messages if (m["role"] == "assistant") is role] for role in (False, True))
    number = str(answers[0]).strip() if answers else ""
    if number.isdigit() and number not in texts:
        problem = f"the answer {number:.100} is a number, and it is unclear whether the first of the {name} is 0 or 1"
        raise BadRecord("unread", f"{problem}: write its letter or its text as the answer; {keys.or_keep(name)}")
    if all(any(text in str(question) for question in asked) for text in texts):
        return
    if len(messages) != 2 or not isinstance(messages[0]["content"], str):
        problem = f"the field {name} has options that the messages do not: write them into the question"
        raise BadRecord("unread", f"{problem}; {keys.or_keep(name)}")
    pairs = list(zip(_LETTERS, texts, strict=False))
    lettered = all(re.match(rf"\(?{letter}[).:]", text) for letter, text in pairs)
    messages[0]["content"] += "".join(f"\n{text if lettered else f'{letter}. {text}'}" for letter, text in pairs)


def _hint(item: Mapping[str, Any]) -> str:
    """The parts of an item that may be meant as a conversation: a list of the real items, or fields to rename."""
    for name, value in item.items():
        if isinstance(value, list) and value and isinstance(value[0], Mapping) and value[0].keys() & {*FORMS}:
            return f"; if the {len(value):,} objects under {name!r:.100} are the items, make a file of that list alone"
    names = [str(name)[:40] for name, value in item.items() if value is not None]
    return f", only {', '.join(names[:8])}{' …' if len(names) > 8 else ''} (--rename theirs=ours)" if names else ""


def _message(turn: Mapping[str, Any], i: int, renames: Mapping[str, str], unread: list[Any]) -> dict[str, Any]:
    """A turn of LLaVA or OpenAI as ``text.chat`` takes it."""
    role, content = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if len(turn) == 2 and not renames and isinstance(content, str) and isinstance(role, str) and role in _ROLES:
        return {"role": _ROLES[role], "content": content}  # nearly all are such
    turn = keys.renamed(turn, renames, "message") if renames else turn
    if not turn.keys() <= _PLAIN:
        unread += keys.unread("message", turn, f"message {i}: ")
    role, content = _one(turn, "from", "role", i), _text(_one(turn, "value", "content", i))
    if not isinstance(role, str) or content is None:
        shown = ", ".join(str(key)[:40] for key, value in turn.items() if value is not None)[:100]
        problem = f"message {i} lacks a role (role, from) or a content (content, value), it has only {shown or 'nulls'}"
        raise BadRecord("fields", f"{problem}: --rename theirs=ours")
    # A rename to anything else is of a field that has the name of a role.
    known = _ROLES.get(renames.get(role, "")) or _ROLES.get(role) or _ROLES.get(role.strip().lower())
    if known is None:
        remedy = f"it must be one of {', '.join(ROLES)}: --rename {role:.100}=user or {role:.100}=assistant"
        if role.strip().lower() in _TOOL_ROLES:
            remedy = "tools are not supported: leave the record out, or write calls and results into the other messages"
        raise BadRecord("role", f"message {i} has role {role!r:.100}: {remedy}")
    if not isinstance(content, str):
        content = [_part(part, i, renames, unread) for part in _rows(content, f"the content of message {i}")]
    message = {"role": known, "content": content}
    if len(turn) > 2:
        message |= {key: turn[key] for key in THOUGHT_KEYS if not keys.is_blank(turn.get(key))}
        flag = keys.loss_flag(turn, f"message {i}: ")
        if flag and known != "assistant":
            raise BadRecord("unread", f"message {i} ({known}) is marked for the loss: only answers are learned")
        if flag is False and known == "assistant":
            message["weight"] = 0
    return message


def _one(turn: Mapping[str, Any], first: str, second: str, i: int) -> Any:
    """The value under one of two keys, where both may be given if they agree."""
    given = [value for value in (turn.get(first), turn.get(second)) if value is not None and value == value]
    if len(given) == 2 and not (isinstance(given[0], str) and given[0] == given[1]):
        raise BadRecord("fields", f"message {i} has both {first} and {second}, and they differ: keep one of them")
    return given[0] if given else None


def _part(part: Mapping[str, Any], i: int, renames: Mapping[str, str], unread: list[Any]) -> Mapping[str, Any]:
    part = keys.renamed(part, renames, "part") if renames else part
    kind, image = chat.kind_of(part), None
    of_thoughts = (*THOUGHT_KEYS, "content") if kind in THOUGHT_KEYS else ()
    unread += keys.unread("part", part, f"message {i}: ", of_thoughts)
    if kind == "image":
        image = next((part[name] for name in IMAGE_KEYS if not keys.is_blank(part.get(name))), None)
        if image is None and isinstance(part.get("index"), int):
            image = _Index(part["index"])
    for name in ("text",) if kind == "image" else IMAGE_KEYS:
        if not keys.is_blank(part.get(name)):
            problem = f"a part of type {kind!r:.60} has the field {name}, which it does not show: write a part for each"
            raise BadRecord("unread", f"message {i}: {problem}")
    if kind == "image":
        return {"type": "image", "image": image}
    return {"type": "text", "text": _text(part.get("text"))} if kind == "text" else part


def _checked(images: list[Any]) -> list[Any]:
    """The images, those that are only numbered as None, if their numbers are in order."""
    listed = [image for image in images if image is None or isinstance(image, _Index)]
    for expected, image in enumerate(listed):
        # In another order than they are listed, images would be assigned to the wrong places.
        if image is not None and image != expected:
            raise BadRecord("fields", f"a part shows image {image} where image {expected} is next in order")
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
