"""From an item, as a data set writes it, to a ``Record``: the same rules for all formats.

    field                          becomes
    id, uid, question_id           ``id`` as a string, the first that is given; none: the item's place, "data.json:18"
    image, images                  ``images``: one or a list, each a path, bytes, a struct of ``bytes`` and ``path``,
                                   ``{"url": …}``, a data URI or a URL; null, NaN and "" are no image
    conversations, messages,       ``messages``, see ``conversations``
    texts, question + answer(s),
    system, options, thoughts
    mode                           ``mode``, "think" or "nothink". None: "think" if an answer begins with <think>,
                                   "nothink" if one begins with the no-think token or blank thoughts, else
                                   ``default_mode``. White space before a tag is removed. An answer with one </think>
                                   and no <think> came after thinking whose <think> was in the prompt (as in R1's
                                   data): it is put back
    task                           ``task``; none: ``ItemOptions.task``
    source                         ``source``; none: the name of the source
    objects                        boxes and points for <bbox>, <point> and <ref> in the text, see ``coordinates``
    metadata                       ``metadata``, if it is a dict
    lineage                        ``lineage``, if it is a list of strings
    anything else                  a key of ``metadata``, if ``keys`` does not refuse it and JSON can express it (no
                                   bytes, no dates), in 64 bits and at most 100 levels; other values are dropped

The no-think token itself is removed: encoding puts it back. Images are read here, so that records are complete and a
missing file is found at import. ``data.store.record_check`` checks strings and images afterwards.
"""

import contextlib
import dataclasses
import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from phivision_jax.data.image_check import check_image
from phivision_jax.data.quarantine import BadRecord, Quarantined, describe_failure
from phivision_jax.data.records import MODES, Mode, Record, check_task
from phivision_jax.data.sources import keys
from phivision_jax.data.sources.conversations import Conversation, conversation_of
from phivision_jax.data.sources.coordinates import fill_placeholders, find_box, rewrite_lists
from phivision_jax.data.sources.fetch import fetch, is_given, other_format
from phivision_jax.data.sources.item_options import ItemOptions
from phivision_jax.data.sources.source import ModeFrom, Read
from phivision_jax.io.memory import limited_memory
from phivision_jax.io.messages import shorten
from phivision_jax.text import chat
from phivision_jax.text.constants import IMAGE_MARKER, THOUGHT_KEYS
from phivision_jax.text.tokenizer import END_THINK, NOTHINK, THINK

IDS = ("id", "uid", "question_id")
_DEEPEST = 100
MOST_BYTES = 128 * 2**20
"""Bytes of the images of a record together."""
LARGE = 4 * 2**20
"""Bytes of a JSON item above which its memory is limited: empty lists take twenty times their text."""
_PEEK = 2**16  # bytes of broken JSON in which an id is looked for


@dataclasses.dataclass(frozen=True)
class ItemReader:
    """Makes records of one source's items."""

    source: str
    folder: Path
    """Folder to which image paths are relative, unless the options name one."""
    options: ItemOptions

    def read(self, item: Any, place: str, where: str) -> Read | Quarantined:
        """The record in an item, or the reason why there is none.

        Args:
          item: the item in Python's types; only a mapping can be a record.
          place: the id of an item that has none.
          where: the item's place for people.

        Raises:
          OSError: when the file of an image exists but cannot be read.
        """
        if not isinstance(item, Mapping):
            return self.bad("syntax", f"the item is {type(item).__name__}, not an object with fields", place, where)
        try:
            return self._read(self._renamed(item), place, where)
        except (BadRecord, chat.MessageError) as bad:
            return self.bad(bad.reason, str(bad), place, where, item)
        except BaseException as error:
            return self.bad("failed", describe_failure(error), place, where, item)

    def read_json(self, raw: bytes, place: str, where: str, problem: str | None = None) -> Read | Quarantined:
        """The record in an item written as JSON; ``problem`` is a reason not to decode it."""
        if problem is not None:
            return self.bad("syntax", problem, place, where, self._guess(raw))
        try:
            # An item of a few megabytes cannot take much, and the limit takes longer than decoding a small one.
            with limited_memory() if len(raw) > LARGE else contextlib.nullcontext():
                item = json.loads(raw.decode())
        except (MemoryError, ValueError, RecursionError) as error:
            return self.undecoded(error, "not JSON", place, where, self._guess(raw))
        return self.read(item, place, where)

    def undecoded(self, error: Exception, problem: str, place: str, where: str, item: Any = None) -> Quarantined:
        """An item whose decoder raised an error, which is raised again if it is the disk's."""
        failure = describe_failure(error)
        if isinstance(error, MemoryError):
            return self.bad("failed", failure, place, where, item)
        if isinstance(error, UnicodeDecodeError):
            return self.bad("encoding", f"not UTF-8: {error.reason} at byte {error.start}", place, where, item)
        return self.bad("syntax", f"{problem}: {shorten(str(error), 300)}", place, where, item)

    def bad(self, reason: str, detail: str, place: str, where: str, item: Any = None) -> Quarantined:
        """A quarantined item, under its own id if ``item`` has one."""
        with contextlib.suppress(BadRecord):
            place = (isinstance(item, Mapping) and _id(self._renamed(item))[1]) or place
        return Quarantined(place, self.source, reason, detail, where)

    def _guess(self, raw: bytes) -> Any:
        """An item with the id that broken JSON still shows."""
        with contextlib.suppress(ValueError, RecursionError):  # often only its UTF-8 is broken
            if len(raw) <= LARGE:
                return json.loads(raw.decode("utf-8", "replace"))
        names = (*IDS, *(theirs for theirs, ours in self.options.renames.items() if ours in IDS))
        text = raw[:_PEEK].decode("utf-8", "replace")
        found = re.search(rf'"({"|".join(map(re.escape, names))})"\s*:\s*("(?:[^"\\]|\\.)*"|-?\d+)', text)
        with contextlib.suppress(ValueError):
            return {found[1]: json.loads(found[2])} if found else None
        return None

    def _renamed(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """The item with its fields renamed, and NaN, as pandas writes an empty cell, as null."""
        renames = {theirs: ours for theirs, ours in self.options.renames.items() if theirs in item}
        kept = {k: None if isinstance(v, float) and v != v else v for k, v in item.items() if k not in renames}
        origin: dict[str, str] = {}
        for theirs, ours in renames.items():
            if keys.is_blank(item[theirs]):
                kept.setdefault(ours, item[theirs])
                continue
            if (other := origin.setdefault(ours, theirs)) != theirs:
                raise BadRecord("fields", f"{other} and {theirs} are both renamed to {ours}, and both have a value")
            kept[ours] = item[theirs]
        return kept

    def _read(self, item: dict[str, Any], place: str, where: str) -> Read:
        options = self.options
        conversation = conversation_of(item, options.renames)
        messages, steps = conversation.messages, item.get("lineage")
        lineage = tuple(steps) if isinstance(steps, list) and all(isinstance(step, str) for step in steps) else None
        used = {*conversation.used, "" if lineage is None else "lineage"}
        level: keys.Level = "question" if "question" in used else "record"
        listed = _listed(item)
        has_images = bool(listed) or any(image is not None for image in conversation.images)
        unread = keys.unread(level, item, used=used, has_images=has_images) + conversation.unread
        if not keys.SPECIAL.isdisjoint(item) and keys.loss_flag(item, "the record: ") is False:
            raise BadRecord("empty-answer", "the record is marked as not to be learned")
        images = self._images(listed, conversation, unread)

        def size_of(k: int) -> tuple[int, int]:
            return check_image(images[k], f"image {k}")

        if options.inline_boxes and len(images) == 1:
            rewrite_lists(messages, options.inline_boxes, lambda: size_of(0))
        elif images and item.get("objects") is None and (box := find_box(messages)):
            unread.append(("boxes in texts", box))
        if item.get("objects") is not None:
            size = item.get("width"), item.get("height")
            if options.boxes == "pixels" and len(images) == 1 and None not in size and size != size_of(0):
                problem = f"width and height are {size!r:.60}, but the image has {size_of(0)}: see --boxes"
                raise BadRecord("coordinates", problem)
            fill_placeholders(messages, item["objects"], options.boxes, len(images), size_of)
        stated = _optional(item, "mode")
        if stated not in (*MODES, None):
            problem = f"the mode is {stated!r:.100}: it must be think, nothink or absent"
            raise BadRecord("fields", f"{problem}; {_aside('mode')}")
        mode, mode_from = settle_mode(messages, stated, options.default_mode)  # type: ignore[arg-type]
        system = any(message["role"] == "system" for message in messages)
        if system and options.system != "template":
            messages = _without_system(messages, keep=options.system == "user")
        task, source, (name, id) = _optional(item, "task") or options.task, _optional(item, "source"), _id(item)
        try:
            check_task(task)
        except ValueError as error:
            raise BadRecord("fields", f"{error}; {_aside('task')}") from None
        used |= {name, "image", "images", "mode", "task", "source", "objects", "metadata", *keys.SYSTEM, *THOUGHT_KEYS}
        source, metadata = self.source if source is None else source, _metadata(item, used)
        record = Record(id or place, source, tuple(images), tuple(messages), mode, task, metadata, lineage or ())
        return Read(record, mode_from, system, where, tuple(unread))

    def _images(self, listed: Sequence[Any], conversation: Conversation, unread: list[Any]) -> list[bytes]:
        """The bytes of the images, in the order of the markers, which a conversation without any may receive."""
        wanted = conversation.images
        if conversation.may_prepend and not wanted:
            first = next(message for message in conversation.messages if message["role"] == "user")
            first["content"] = (IMAGE_MARKER + "\n") * len(listed) + first["content"]
            wanted = [None] * len(listed)
        free = sum(image is None for image in wanted)
        if free != len(listed):
            given = len(wanted) - free
            besides = f" besides the {given} in the messages" if given else ""
            counts = [(i, m["content"].count(IMAGE_MARKER)) for i, m in enumerate(conversation.messages)]
            places = ", ".join(f"message {i}: {count}" for i, count in counts if count)
            markers = f"{free} {IMAGE_MARKER} markers{f' ({places})' if places else ''}"
            escape = rf"; write <\{IMAGE_MARKER[1:]} where the text is meant" if free > len(listed) else ""
            raise BadRecord("image-count", f"{markers}, but {len(listed)} images{besides}{escape}")
        rest, folder = iter(listed), self.options.images or self.folder
        images: list[bytes] = []
        for image in wanted:
            given = next(rest) if image is None else image
            images.append(fetch(given, folder, self.options))
            if other_format(given, images[-1]):
                unread.append(("endings of image names (the content decides)", given))
            if sum(map(len, images)) > MOST_BYTES:
                raise BadRecord("image-size", f"its images have more than {MOST_BYTES:,} bytes together")
        return images


def settle_mode(
    messages: Sequence[dict[str, Any]], stated: Mode | None, default: Literal["nothink", "think", "refuse"]
) -> tuple[Mode, ModeFrom]:
    """The mode of a conversation, whose answers are rewritten in place by the rules of the module's table.

    Raises:
      BadRecord: "mode" when no mode is stated or shown and ``default`` is "refuse".
    """
    shown: list[Mode | None] = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        content = message["content"]
        bare = THINK not in content and content.count(END_THINK) == 1 and not content.lstrip().startswith(NOTHINK)
        if bare and stated != "nothink":
            content = THINK + content
        try:
            message["content"], mode = chat.settle_answer(content)
        except chat.MessageError as error:
            raise BadRecord(error.reason, f"message {i}: {error}") from None
        shown.append(mode)
    if stated is not None:
        return stated, "stated"
    if any(shown):
        return "think" if "think" in shown else "nothink", "inferred"
    if default == "refuse":
        raise BadRecord("mode", "no mode is stated, and the answers begin with neither mode's tag")
    return default, "default"


def _without_system(messages: Sequence[dict[str, Any]], keep: bool) -> list[dict[str, Any]]:
    """The messages without system messages; ``keep`` puts their text before the first user message."""
    system = [message["content"] for message in messages if message["role"] == "system"]
    if any(IMAGE_MARKER in text for text in system):
        raise BadRecord("image-count", "a system message has an image, but is not kept in its place")
    rest = [message for message in messages if message["role"] != "system"]
    if keep:
        first = next((message for message in rest if message["role"] == "user"), None)
        if first is None:
            raise BadRecord("role", "a system message, but no user message before which it could be put")
        first["content"] = "\n\n".join([*system, first["content"]])
    if not rest:
        raise BadRecord("fields", "it has no messages besides system messages")
    return rest


def _listed(item: Mapping[str, Any]) -> list[Any]:
    """The item's ``image`` or ``images``."""
    held = [item[name] for name in ("image", "images") if is_given(item.get(name)) and item[name] != []]
    if len(held) > 1:
        raise BadRecord("fields", "it has both image and images")
    return [image for image in (held[0] if held and isinstance(held[0], list) else held) if is_given(image)]


def _id(item: Mapping[str, Any]) -> tuple[str, str]:
    """The field that has the item's id, and the id; empty without one."""
    name, id = next(((name, item[name]) for name in IDS if item.get(name) not in (None, "")), ("", ""))
    if not isinstance(id, str | int | float):
        raise BadRecord("fields", f"the id is {type(id).__name__}: it must be a string or a number")
    return name, str(id)


def _optional(item: Mapping[str, Any], name: str) -> str | None:
    value = item.get(name)
    if value is not None and not isinstance(value, str):
        raise BadRecord("fields", f"the field {name} is {type(value).__name__}: it must be a string; {_aside(name)}")
    return value


def _aside(name: str) -> str:
    return f"--rename {name}=dataset_{name} keeps it as metadata"


def _metadata(item: Mapping[str, Any], used: Collection[str]) -> dict[str, Any]:
    own = item.get("metadata")
    own = own if isinstance(own, Mapping) else {} if own is None else {"metadata": own}
    kept = {**own, **{name: value for name, value in item.items() if name not in used}}
    return {name: value for name, value in kept.items() if isinstance(name, str) and _storable(value)}


def _storable(value: Any, depth: int = 0) -> bool:
    """True for a value that JSON and msgpack can both store and give back."""
    if depth > _DEEPEST:
        return False
    if isinstance(value, int):
        return -(2**63) <= value < 2**64
    if isinstance(value, dict):
        return all(isinstance(k, str) and _storable(v, depth + 1) for k, v in value.items())
    if isinstance(value, list):
        return all(_storable(v, depth + 1) for v in value)
    return value is None or isinstance(value, str | float)
