"""Keys of records, messages and parts of contents: which an import reads, and which it must not ignore.

    understood   the readers use it; docs/data.md has the table
    meaningful   other trainers give it a meaning that imports do not support: records with a value there are refused;
                 keys.toml has the table
    harmless     ids, sources, scores and the like, and every ``dataset_…``: metadata
    unread       anything else: as harmless, but counted by name, with an example, in the summary of the import

Names are compared in lower case with underscores between words: ``imageUrl`` and ``Image-URL`` are ``image_url``. A
value that looks like an image, video or audio is refused under any name that is not read.
"""

import functools
import itertools
import re
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from phivision_jax.data.quarantine import BadRecord
from phivision_jax.io.messages import shorten
from phivision_jax.text.chat import ESCAPE
from phivision_jax.text.constants import THOUGHT_KEYS

Level = Literal["record", "question", "message", "turn", "part"]
"""A record; one in the form of a question and an answer; a message; a turn of a user and an assistant; a part."""

SYSTEM = ("system", "system_prompt", "system_message", "system_instruction")
"""Fields of a record with a system message; of several, they must agree."""
OPTIONS = ("options", "choices")
FLAGS = ("weight", "loss", "train", "training", "trainable", "loss_weight", "loss_scale")
"""Flags of an answer, or of a record: 0 or false excludes it from the loss, 1 or true is the same as none."""
UNDERSTOOD: Mapping[Level, frozenset[str]] = {
    "record": frozenset(
        ("id", "uid", "question_id", "image", "images", "mode", "task", "source", "objects", "metadata", "lineage")
    ).union(SYSTEM, OPTIONS, FLAGS, THOUGHT_KEYS),
    "message": frozenset(("from", "role", "value", "content", *FLAGS, *THOUGHT_KEYS)),
    "turn": frozenset(("system", "user", "assistant")),
    "part": frozenset(("type", "text", "image", "bytes", "path", "url", "index", "image_url")),
}

SPECIAL = frozenset((*SYSTEM, *OPTIONS, *FLAGS, *THOUGHT_KEYS))
"""Fields of a record that change its messages, and that few have."""

_TABLE = tomllib.loads(Path(__file__).with_name("keys.toml").read_text(encoding="utf-8"))
_HARMLESS = re.compile(_TABLE["harmless"], re.VERBOSE)
_TEXT = (str, bytes, list, dict)
_TYPES: dict[str, Any] = {"any": object, "text": _TEXT, "bool": bool, "text or bool": (*_TEXT, bool)}
_DEEPEST = 3
_FILE_KEY = re.compile(r"(.*_)?(file|path|filename|filepath|name|url|uri|link|src|id)s?")
_MEDIA_FILE = re.compile(
    r"\.(?:(?P<image>png|jpe?g|jfif|webp|gif|bmp|tiff?|heic|heif|avif|jp2|svg)"
    r"|(?P<video>mp4|webm|mov|avi|mkv|m4v)|(?P<audio>wav|mp3|flac|ogg|m4a|aac|opus))(?:[?#]\S*)?$",
    re.IGNORECASE,
)
_ENCODED = re.compile(r"data:(image|video|audio)/|(?:/9j/|iVBORw0KGgo|R0lGOD|UklGR)[A-Za-z0-9+/]{40}")
_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"II*\0", b"MM\0*")
_MARKER = re.compile(
    r"(?!<(?-i:image)>)<\|?(?:(?:start_of_|end_of_)?(?:image|img|video|audio|speech)s?(?:[ _-]?\d+|_?(?:pad|"
    r"placeholder|soft_token|token|start|end|bos|eos|here|context|patch))?|im_patch|vision_(?:start|end))\|?/?>"
    r"|(?P<box><\|?(?:box|quad|box_start|quad_start|object_ref_start|det|click|coordinate|(?:loc|seg|pos|bin)_?\d+)\|?>"
    r"|<points?\s[^<>]*\bx\d*=|</bbox>|\"(?:bbox|point)_2d\"\s*:)"
    r"|(?P<switch>(?<!\S)/(?:no_?)?think(?!\S))"
    r"|data:(?:image|video|audio)/[\w.+-]+;base64,",
    re.IGNORECASE,
)


@functools.lru_cache(4096)
def _classify(level: Level, key: str) -> tuple[str, Any, str, bool]:
    """A key's name in lower case, the types of values with a meaning, its problem, and whether the key is harmless."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[\s.-]+", "_", key).lower()
    rows = () if name.startswith("dataset_") else _TABLE["meanings"]
    found = [row for row in rows if level in row["levels"] and re.fullmatch(row["names"], name, re.VERBOSE)]
    types, problem = (_TYPES[found[0]["values"]], found[0]["problem"]) if found else ((), "")
    return name, types, problem, _HARMLESS.fullmatch(name) is not None


def unread(
    level: Level, fields: Mapping[str, Any], where: str = "", used: Collection[str] = (), has_images: bool = False
) -> list[tuple[str, Any]]:
    """Names and values of the keys that are neither understood nor harmless.

    Args:
      level: kind of the mapping.
      fields: the mapping.
      where: its place in messages, "" for a record.
      used: further keys that are understood.
      has_images: the record has images, so another key may hold the name of one of them.

    Raises:
      BadRecord: "unread" for a key that must not be ignored, or a value that looks like media.
    """
    understood, found = UNDERSTOOD["record" if level == "question" else level], []
    for key, value in fields.items():
        if key in understood or key in used or is_blank(value):
            continue
        name, types, problem, harmless = _classify(level, str(key))
        kind = None if name.startswith("dataset_") else looks_like_media(value)
        if has_images and isinstance(value, str) and kind in (None, "image") and _FILE_KEY.fullmatch(name):
            kind, types = None, ()
        if not isinstance(value, types):
            problem = kind or ""
        if problem:
            in_message = level in ("message", "turn")
            remedy = "put it into the field images of the record" if in_message else "--rename {key}=image"
            problem = f"looks like an image: {remedy}" if problem == "image" else problem
            if problem in ("video", "audio"):
                problem = "looks like video or audio, which the model does not support: leave the record out"
            shown = shorten(key, 60)
            raise BadRecord("unread", f"{where}the field {shown} {problem.format(key=shown)}; {or_keep(shown)}")
        if not harmless:
            found.append((f"{key} of {level}s" if level in ("message", "turn", "part") else str(key), value))
    return found


def check_text(text: str, where: str) -> None:
    """Refuse markers of media and boxes in the forms of other models.

    Raises:
      BadRecord: "unread".
    """
    if ("<" in text or "data:" in text or "_2d" in text or "think" in text) and (marker := _MARKER.search(text)):
        wanted = "write [x1, y1, x2, y2] and use --inline-boxes" if marker["box"] else "write <image> for each"
        wanted = "remove it, and write the mode into the field mode" if marker["switch"] else wanted
        wanted = "leave the record out" if re.search("video|audio|speech", marker[0], re.IGNORECASE) else wanted
        escape = f", or {shorten(text)} where the text is meant" if ESCAPE.match(text := "<\\" + marker[0][1:]) else ""
        raise BadRecord("unread", f"{where} contains {shorten(marker[0])}, a marker of other models: {wanted}{escape}")


def is_blank(value: Any, depth: int = 0) -> bool:
    """True for null, NaN, white space, and lists and mappings of nothing else."""
    if value is None:
        return True
    if isinstance(value, str):
        return not value or value.isspace()
    if isinstance(value, dict | list) and depth < _DEEPEST:
        return all(is_blank(inner, depth + 1) for inner in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, float) and value != value


def looks_like_media(value: Any, depth: int = 0) -> Literal["image", "video", "audio"] | None:
    """The kind of media that a value seems to be: a file name, a URL, an encoded file, or a list or struct of them."""
    if isinstance(value, str):
        if "." in value and (found := _MEDIA_FILE.search(value[-200:])) and "\n" not in value:
            return found.lastgroup  # type: ignore[return-value]
        encoded = _ENCODED.match(value) if len(value) > 20 else None
        return (encoded[1] or "image") if encoded else None  # type: ignore[return-value]
    if isinstance(value, dict | list) and depth < _DEEPEST:
        inner = itertools.islice(value.values() if isinstance(value, dict) else value, 8)
        return next((kind for one in inner if (kind := looks_like_media(one, depth + 1))), None)
    return "image" if isinstance(value, bytes) and value.startswith(_MAGIC) else None


def loss_flag(fields: Mapping[str, Any], where: str = "") -> bool | None:
    """The flag that decides whether an answer is learned; None where there is none.

    Raises:
      BadRecord: "fields" for any value but 0, 1, false and true, or flags that contradict each other.
    """
    given = {name: fields[name] for name in FLAGS if not is_blank(fields.get(name))}
    for name, value in given.items():
        if not isinstance(value, int | float) or value not in (0, 1):
            raise BadRecord("fields", f"{where}its {name} is {shorten(value)}: it must be 0 (no loss) or 1")
    if len(set(given.values())) > 1:
        raise BadRecord("fields", f"{where}{' and '.join(given)} contradict each other: keep one of them")
    return bool(next(iter(given.values()))) if given else None


def renamed(fields: Mapping[str, Any], renames: Mapping[str, str], level: Level) -> Mapping[str, Any]:
    """A message or part with other keys: those whose new name has a meaning there, or begins with "dataset_"."""
    known = UNDERSTOOD[level]
    if not any(key in fields for key in renames):
        return fields
    apply = {k: v for k, v in renames.items() if v in known or (k not in known and v.startswith("dataset_"))}
    kept = {key: value for key, value in fields.items() if key not in apply}
    return kept | {apply[key]: value for key, value in fields.items() if key in apply}


def or_keep(key: str) -> str:
    """Advice for a key that means something else in the data."""
    return f"--rename {key}=dataset_{key} imports the record without it"
