"""From an item, as a data set writes it, to a ``Record``: one way for all formats.

    field                          becomes
    id, uid, question_id           ``id``, the first that is there, as a string; none: the item's place, "data.json:18"
    image, images                  ``images``: one or a list, of which each is a path, bytes, a struct of ``bytes`` and
                                   ``path``, ``{"url": …}``, a data URI or a URL; null and "" are no image
    conversations, messages,       ``messages``, see ``conversations``
    texts, question + answer(s)
    mode                           ``mode``, "think" or "nothink". None: "think" where an answer begins with <think>,
                                   "nothink" where one begins with the no-think token, else ``default_mode``. White
                                   space in front of either is taken off. An answer with one </think> and no <think>
                                   thought all the same, its <think> stood in the prompt (R1's): it is put in front
    task                           ``task``; none: ``ItemOptions.task``
    source                         ``source``; none: the name of the source
    objects                        boxes and points for <bbox>, <point> and <ref> in the text, see ``coordinates``
    metadata                       ``metadata``, if it is a dict
    lineage                        ``lineage``, if it is a list of strings
    anything else                  a key of ``metadata``, if it is what JSON can say: no bytes, dates, numbers beyond 64
                                   bits, or more than 100 levels. What is not is left out

The no-think token itself is taken off: it is put back when a record is encoded. Images are read here, so that a record
is whole and a missing file shows at import; whether they can be decoded is asked later, by ``check``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from phivision_jax.data.quarantine import BadRecord, Quarantined
from phivision_jax.data.records import MODES, TASKS, Mode, Record
from phivision_jax.data.sources.conversations import NEXT, conversation_of
from phivision_jax.data.sources.coordinates import fill_placeholders, rewrite_lists
from phivision_jax.data.sources.fetch import fetch, is_given
from phivision_jax.data.sources.item_options import ItemOptions
from phivision_jax.data.sources.source import ModeFrom, Read
from phivision_jax.images.decode import ImageTooLargeError, image_size
from phivision_jax.text.constants import IMAGE_MARKER
from phivision_jax.text.tokenizer import END_THINK, NOTHINK, THINK

IDS = ("id", "uid", "question_id")
_DEEPEST = 100
_PEEK = 2**16  # bytes of broken JSON in which an id is looked for


@dataclasses.dataclass(frozen=True)
class ItemReader:
    """Makes records of one source's items."""

    source: str
    folder: Path
    """Where the images' paths begin if the options do not say."""
    options: ItemOptions

    def read(self, item: Any, place: str, where: str) -> Read | Quarantined:
        """The record in an item, or why there is none.

        Args:
          item: what the format gave, a mapping if it is to be a record.
          place: the id of an item that has none.
          where: the item's place, for a person.

        Raises:
          OSError: when the file of an image is there but cannot be read.
        """
        if not isinstance(item, Mapping):
            return self.bad("syntax", f"the item is {type(item).__name__}, not an object with fields", place, where)
        try:
            return self._read(self._renamed(item), place, where)
        except BadRecord as bad:
            return self.bad(bad.reason, str(bad), place, where, item)

    def read_json(self, raw: bytes, place: str, where: str, problem: str | None = None) -> Read | Quarantined:
        """The record in an item written as JSON; ``problem`` is a reason not to decode it."""
        reason = "syntax"
        try:
            if problem is None:
                return self.read(json.loads(raw.decode()), place, where)
        except UnicodeDecodeError as error:
            reason, problem = "encoding", f"not UTF-8: {error.reason} at byte {error.start} of the item"
        except RecursionError:
            problem = "too many nested brackets"
        except ValueError as error:
            problem = f"not JSON: {error}"
        return self.bad(reason, problem, place, where, self._guess(raw))

    def bad(self, reason: str, detail: str, place: str, where: str, item: Any = None) -> Quarantined:
        """A quarantined item, under its own id if ``item`` has one."""
        try:
            own = _id(self._renamed(item)) if isinstance(item, Mapping) else None
        except BadRecord:
            own = None
        parts = (own or place, self.source, detail, where)
        # The quarantine's file must be writable, whatever the strings contain.
        id, source, detail, where = (part.encode("utf-8", "backslashreplace").decode() for part in parts)
        return Quarantined(id, source, reason, detail, where)

    def _guess(self, raw: bytes) -> Any:
        """An item with the id that broken JSON still shows."""
        with contextlib.suppress(ValueError, RecursionError):  # often only its UTF-8 is broken
            return json.loads(raw.decode("utf-8", "replace"))
        names = (*IDS, *(theirs for theirs, ours in self.options.renames.items() if ours in IDS))
        text = raw[:_PEEK].decode("utf-8", "replace")
        found = re.search(rf'"({"|".join(map(re.escape, names))})"\s*:\s*("(?:[^"\\]|\\.)*"|-?\d+)', text)
        with contextlib.suppress(ValueError):
            return {found[1]: json.loads(found[2])} if found else None
        return None

    def _renamed(self, item: Mapping[str, Any]) -> dict[str, Any]:
        renames = {theirs: ours for theirs, ours in self.options.renames.items() if theirs in item}
        kept = {name: value for name, value in item.items() if name not in renames}
        return kept | {ours: item[theirs] for theirs, ours in renames.items()}

    def _read(self, item: dict[str, Any], place: str, where: str) -> Read:
        options = self.options
        _check_text(item)
        conversation = conversation_of(item)
        messages = conversation.messages
        images = self._images(item, conversation.images, messages if conversation.may_prepend else None)

        def size_of(k: int) -> tuple[int, int]:
            return _size_of(images[k], k)

        if options.inline_boxes and len(images) == 1:
            rewrite_lists(messages, options.inline_boxes, lambda: size_of(0))
        if item.get("objects") is not None:
            fill_placeholders(messages, item["objects"], options.boxes, len(images), size_of)
        stated = _optional(item, "mode")
        if stated is not None and stated not in MODES:
            raise BadRecord("fields", f"the mode is {stated!r}: it must be one of {', '.join(MODES)}; {_aside('mode')}")
        mode, mode_from = settle_mode(messages, stated, options.default_mode)  # type: ignore[arg-type]
        system = any(message["role"] == "system" for message in messages)
        if system and options.system != "template":
            messages = _without_system(messages, keep=options.system == "user")
        task = _optional(item, "task") or options.task
        name = next((name for name in IDS if item.get(name) not in (None, "")), None)
        used = [*conversation.used, name, "image", "images", "mode", "task", "source", "objects", "metadata"]
        lineage = item.get("lineage")
        if isinstance(lineage, list) and all(isinstance(step, str) for step in lineage):
            used.append("lineage")
        else:
            lineage = []
        try:
            record = Record(
                id=_id(item) or place,
                source=self.source if (source := _optional(item, "source")) is None else source,
                images=tuple(images),
                messages=tuple(messages),
                mode=mode,
                task=task,
                metadata=_metadata(item, used),
                lineage=tuple(lineage),
            )
        except BadRecord:
            raise
        except ValueError as error:
            aside = "" if task in TASKS else f" {_aside('task')}, and --task then says one for all"
            raise BadRecord("fields", f"{error}{aside}") from None
        return Read(record, mode_from, system, where)

    def _images(
        self, item: Mapping[str, Any], wanted: list[Any], prepend_to: Sequence[dict[str, Any]] | None
    ) -> list[bytes]:
        """The bytes of the images, in the order of the markers.

        Args:
          item: may hold images.
          wanted: for each marker an image, or ``NEXT`` of those the item holds.
          prepend_to: the messages before which images without a marker belong, if they do.
        """
        listed = _listed(item)
        if prepend_to and not wanted:
            prepend_to[0]["content"] = (IMAGE_MARKER + "\n") * len(listed) + prepend_to[0]["content"]
            wanted = [NEXT] * len(listed)
        free = sum(image is NEXT for image in wanted)
        if free != len(listed):
            at_markers = len(wanted) - free
            raise BadRecord(
                "image-count",
                f"{free} {IMAGE_MARKER} markers in the messages, but {len(listed)} images"
                + (f" besides the {at_markers} given in the messages" if at_markers else ""),
            )
        rest = iter(listed)
        options = self.options
        get = functools.partial(
            fetch,
            folder=options.images or self.folder,
            also_allow=options.also_allow,
            allow_urls=options.allow_urls,
            any_extension=options.any_extension,
        )
        return [get(next(rest) if image is NEXT else image) for image in wanted]


def settle_mode(
    messages: Sequence[dict[str, Any]], stated: Mode | None, default: Literal["nothink", "think", "refuse"]
) -> tuple[Mode, ModeFrom]:
    """The mode of a conversation; its answers become what they are in records, in place (see the module's table).

    Raises:
      BadRecord: "mode" where nothing says which and ``default`` is "refuse".
    """
    answers = [message for message in messages if message["role"] == "assistant"]
    inferred: Mode | None = None
    for answer in answers:
        content = answer["content"]
        if content.lstrip().startswith((NOTHINK, THINK)):
            content = content.lstrip()
        if content.startswith(NOTHINK):
            content = content.removeprefix(NOTHINK)
            inferred = inferred or "nothink"
        elif stated != "nothink" and THINK not in content and content.count(END_THINK) == 1:
            content = THINK + content
        if content.startswith(THINK):
            inferred = "think"
        answer["content"] = content
    if stated is not None:
        return stated, "stated"
    if inferred is not None:
        return inferred, "inferred"
    if default == "refuse":
        raise BadRecord("mode", "no mode is stated, and none shows in how the answers begin")
    return default, "default"


def _without_system(messages: Sequence[dict[str, Any]], keep: bool) -> list[dict[str, Any]]:
    """The messages without the system's; ``keep``: their text is put in front of the first user message."""
    system = [message["content"] for message in messages if message["role"] == "system"]
    if any(IMAGE_MARKER in text for text in system):
        raise BadRecord("image-count", "an image stands in a system message, which is not kept in its place")
    rest = [message for message in messages if message["role"] != "system"]
    if keep:
        first = next((message for message in rest if message["role"] == "user"), None)
        if first is None:
            raise BadRecord("role", "a system message, but no user message that it could be put in front of")
        first["content"] = "\n\n".join([*system, first["content"]])
    return rest


def _listed(item: Mapping[str, Any]) -> list[Any]:
    """What the item holds as ``image`` or ``images``."""
    held = [item[name] for name in ("image", "images") if is_given(item.get(name)) and item[name] != []]
    if len(held) > 1:
        raise BadRecord("fields", "both image and images are there: which is meant?")
    images = held[0] if held and isinstance(held[0], list) else held
    return [image for image in images if is_given(image)]


def _size_of(image: bytes, k: int) -> tuple[int, int]:
    try:
        width, height = image_size(image, f"image {k}")
    except ImageTooLargeError as error:
        raise BadRecord("image-size", str(error)) from None
    except (ValueError, OSError) as error:  # Of bytes in memory, an OSError is the decoder's.
        raise BadRecord("image-broken", str(error)) from None
    if min(width, height) < 1:
        raise BadRecord("image-broken", f"image {k} has {width}x{height} pixels")
    return width, height


def _id(item: Mapping[str, Any]) -> str | None:
    id = next((item[name] for name in IDS if item.get(name) not in (None, "")), None)
    if not isinstance(id, str | int | float | None):
        raise BadRecord("fields", f"the id is {type(id).__name__}: it must be a string or a number")
    return None if id is None else str(id)


def _optional(item: Mapping[str, Any], name: str) -> str | None:
    value = item.get(name)
    if value is not None and not isinstance(value, str):
        raise BadRecord("fields", f"the field {name} is {type(value).__name__}: it must be a string; {_aside(name)}")
    return value


def _aside(name: str) -> str:
    """How an import goes on with a field that means something else than ours of that name."""
    return f"--rename {name}=dataset_{name} keeps it as metadata"


def _metadata(item: Mapping[str, Any], used: Sequence[str | None]) -> dict[str, Any]:
    own = item.get("metadata")
    if own is not None and not isinstance(own, Mapping):
        own = {"metadata": own}
    rest = {name: value for name, value in item.items() if name not in used}
    return {name: value for name, value in {**(own or {}), **rest}.items() if isinstance(name, str) and _sayable(value)}


def _sayable(value: Any, depth: int = 0) -> bool:
    """Whether JSON and msgpack can both say it, and say it back."""
    if depth > _DEEPEST:
        return False
    if isinstance(value, int):
        return -(2**63) <= value < 2**64
    if isinstance(value, Mapping):
        return all(isinstance(k, str) and _sayable(v, depth + 1) for k, v in value.items())
    if isinstance(value, list):
        return all(_sayable(v, depth + 1) for v in value)
    return value is None or isinstance(value, str | float)


def _check_text(item: Mapping[str, Any]) -> None:
    """Refuse half of a surrogate pair anywhere, which JSON can write and UTF-8 cannot.

    Not recursive: what JSON can nest may be deeper than Python's stack.
    """
    stack: list[tuple[str, Any]] = [("a field's name", list(item)), *((f"the field {k!r}", v) for k, v in item.items())]
    while stack:
        what, value = stack.pop()
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise BadRecord("encoding", f"{what} is not Unicode text: {error.reason} at {error.start}") from None
        elif isinstance(value, Mapping):
            stack += ((what, key) for key in value)
            stack += ((what, entry) for entry in value.values())
        elif isinstance(value, list):
            stack += ((what, entry) for entry in value)
