"""Export: a dataset as JSON lines and image files, for other programs.

    OUT/data.jsonl                one object per record, in order
    OUT/images/ab/ab12….jpg       each image once, byte for byte, under its sha256

Importing OUT gives the same records again: ids, sources, messages, images, modes, tasks, metadata and lineage.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from phivision_jax.data.records import Record
from phivision_jax.data.store.dataset import Dataset
from phivision_jax.images.decode import image_format
from phivision_jax.io import atomic
from phivision_jax.io.progress import bar
from phivision_jax.text.constants import IMAGE_MARKER

DATA = "data.jsonl"
_LLAVA_ROLES = {"user": "human", "assistant": "gpt", "system": "system"}
_EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "TIFF": "tif", "BMP": "bmp"}


def export(dataset: Dataset, out: Path, format: Literal["llava", "messages"], *, progress: bool = True) -> int:
    """Write all records of a dataset.

    Args:
      dataset: the dataset.
      out: directory to make; it appears complete or not at all.
      format: "llava" (image, conversations) or "messages" (role and content, with images as parts of the content where
        that is equivalent).
      progress: show a progress bar.

    Returns:
      the number of records.

    Raises:
      FileExistsError: when ``out`` exists.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists; remove it or choose another name")
    with (
        atomic.new_directory(out) as folder,
        (folder / DATA).open("w", encoding="utf-8", newline="\n") as file,
        bar(f"export to {out}", len(dataset), shown=progress) as advance,
    ):
        for i in range(len(dataset)):
            record = dataset[i]
            paths = [_save(image, folder) for image in record.images]
            fields = _llava(record, paths) if format == "llava" else _messages(record, paths)
            own = {name: getattr(record, name) for name in ("mode", "task", "source", "metadata", "lineage")}
            file.write(json.dumps({"id": record.id, **fields, **own}, ensure_ascii=False) + "\n")
            advance(1)
    return len(dataset)


def _llava(record: Record, paths: Sequence[str]) -> dict[str, Any]:
    image = {"image": paths[0] if len(paths) == 1 else list(paths)} if paths else {}
    turns = [{"from": _LLAVA_ROLES[m["role"]], "value": m["content"], **_weight(m)} for m in record.messages]
    return {**image, "conversations": turns}


def _messages(record: Record, paths: Sequence[str]) -> dict[str, Any]:
    # An image part means a marker and a line break; a marker without one cannot be written as a part.
    texts = [message["content"].split(IMAGE_MARKER + "\n") for message in record.messages]
    if any(IMAGE_MARKER in piece for pieces in texts for piece in pieces):
        return {"images": list(paths), "messages": [dict(message) for message in record.messages]}
    rest = iter(paths)
    messages: list[dict[str, Any]] = []
    for message, (first, *others) in zip(record.messages, texts, strict=True):
        parts = [{"type": "text", "text": first}]
        for piece in others:
            parts += [{"type": "image", "image": next(rest)}, {"type": "text", "text": piece}]
        content = [part for part in parts if part.get("text") != ""] if others else first
        messages.append({"role": message["role"], "content": content, **_weight(message)})
    return {"messages": messages}


def _weight(message: Mapping[str, Any]) -> dict[str, Any]:
    return {"weight": 0} if message.get("weight") == 0 else {}


def _save(content: bytes | str, folder: Path) -> str:
    """Write an image unless it exists; return its path in the folder."""
    assert isinstance(content, bytes)  # as in every dataset
    digest = hashlib.sha256(content).hexdigest()
    path = f"images/{digest[:2]}/{digest}.{_EXTENSIONS.get(image_format(content) or '', 'bin')}"
    if not (folder / path).exists():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return path
