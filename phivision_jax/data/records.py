"""Records: one conversation with its images, whatever the data once looked like."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, Literal, get_args

import msgpack

from phivision_jax.text.tokenizer import THINK

Mode = Literal["think", "nothink"]
MODES: tuple[str, ...] = get_args(Mode)
# The index and the metrics hold positions in this tuple: append, never reorder.
TASKS: tuple[str, ...] = (
    "general", "math", "science", "gui", "ocr", "chart", "document", "caption", "text",
    "grounding", "safety",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Record:
    """One conversation with its images, before any tokenizer or resizing.

    ``images`` are encoded files (bytes) or paths, in the order in which ``<image>`` stands in the messages.
    ``messages`` are ``{"role": …, "content": str}``; an answer that is not to be learned has ``"weight": 0`` too.
    ``mode`` is how the assistant answers; None: to be inferred.

    Raises:
      ValueError: for an empty id, no messages, an unknown mode or an unknown task (with the closest known one).
    """

    id: str
    source: str
    images: tuple[bytes | str, ...]
    messages: tuple[Mapping[str, Any], ...]
    mode: Mode | None = None
    task: str = "general"
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.id:
            raise ValueError(f"a record of source {self.source!r} has an empty id; give each record a unique one")
        if not self.messages:
            raise ValueError(f"record {self.id!r} has no messages")
        if self.mode is not None and self.mode not in MODES:
            raise ValueError(f"record {self.id!r}: mode must be one of {MODES} or None, not {self.mode!r}")
        if self.task not in TASKS:
            near = difflib.get_close_matches(self.task, TASKS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(TASKS)}."
            raise ValueError(f"record {self.id!r}: unknown task {self.task!r}; {hint}")

    def to_bytes(self) -> bytes:
        """The payload of one ArrayRecord entry (msgpack)."""
        return msgpack.packb({f.name: getattr(self, f.name) for f in dataclasses.fields(self)})

    @classmethod
    def from_bytes(cls, payload: bytes) -> Record:
        fields = msgpack.unpackb(payload)
        return cls(**{**fields, "images": tuple(fields["images"]), "messages": tuple(fields["messages"])})


def mode_of(record: Record) -> Mode:
    """The record's mode; where it states none, "think" if an answer begins with ``<think>``, else "nothink"."""
    if record.mode is not None:
        return record.mode
    answers = (message["content"] for message in record.messages if message["role"] == "assistant")
    return "think" if any(answer.startswith(THINK) for answer in answers) else "nothink"
