"""The record: one conversation with its images, the one form of data that the rest of the package knows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

import msgpack

from phivision_jax.config import dataclass_from_dict
from phivision_jax.text.constants import ROLES, Mode
from phivision_jax.text.tokenizer import THINK

MODES: tuple[str, ...] = get_args(Mode)
# Indices store positions in this tuple, and those of other tasks after it: never reorder, never append.
TASKS: tuple[str, ...] = (
    "general", "math", "science", "gui", "ocr", "chart", "document", "caption", "text",
    "grounding", "safety",
)  # fmt: skip
"""The known tasks; a record may have any other."""
_LONGEST_TASK = 64


@dataclasses.dataclass(frozen=True)
class Record:
    """One conversation with its images, before any tokenizer or resizing.

    Raises:
      ValueError: for an empty id, no messages, an unknown mode, or a task that is not a name.
    """

    id: str
    source: str
    images: tuple[bytes | str, ...]
    """Encoded files or paths, in the order of ``<image>`` in the messages."""
    messages: tuple[Mapping[str, Any], ...]
    """``{"role": …, "content": str}``; ``"weight": 0`` excludes an assistant message from the loss."""
    mode: Mode | None = None
    """Form of the answers; None: inferred from them, see ``mode_of``."""
    task: str = "general"
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    lineage: tuple[str, ...] = dataclasses.field(default=(), compare=False)
    """The steps that made the record, oldest first, each as "step: item", where the item is what the step read."""

    def __post_init__(self) -> None:
        if not self.id:
            raise ValueError(f"a record of source {self.source!r:.100} has an empty id; give each record a unique one")
        if not self.messages:
            raise ValueError(f"record {self.id!r:.100} has no messages")
        if self.mode is not None and self.mode not in MODES:
            raise ValueError(f"record {self.id!r:.100}: mode must be one of {MODES} or None, not {self.mode!r:.100}")
        if self.task not in TASKS:
            check_task(self.task, f"record {self.id!r:.100}: ")

    def to_bytes(self) -> bytes:
        """The payload of one ArrayRecord entry (msgpack)."""
        return msgpack.packb({f.name: getattr(self, f.name) for f in dataclasses.fields(self)})

    @classmethod
    def from_bytes(cls, payload: bytes) -> Record:
        """The record in a payload, whose images must be bytes: paths in a dataset would be read wherever they lead.

        Raises:
          Exception: for anything else; msgpack has errors of its own.
        """
        record = dataclass_from_dict(cls, msgpack.unpackb(payload))  # of two types, it takes the first
        if not all(m.get("role") in ROLES and isinstance(m.get("content"), str) for m in record.messages):
            raise ValueError("a message has no known role, or its content is no text")
        return record


def check_task(task: str, where: str = "") -> None:
    """Raises ValueError for a task that cannot be shown in tables and metrics."""
    if not task.strip() or len(task) > _LONGEST_TASK or not task.isprintable():
        raise ValueError(f"{where}the task {task!r:.100} must be a name of 1 to {_LONGEST_TASK} printable characters")


def join_tasks(names: Iterable[Sequence[str]]) -> tuple[str, ...]:
    """The names of several datasets' tasks together: ``TASKS``, and all others in alphabetical order."""
    return (*TASKS, *sorted({task for some in names for task in some} - {*TASKS}))


def mode_of(record: Record) -> Mode:
    """The record's mode; if it has none, "think" if any answer begins with ``<think>``, else "nothink"."""
    if record.mode is not None:
        return record.mode
    answers = (message["content"] for message in record.messages if message["role"] == "assistant")
    return "think" if any(answer.startswith(THINK) for answer in answers) else "nothink"
