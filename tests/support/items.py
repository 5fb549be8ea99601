"""Items of a conversation in every form, and the reading of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from phivision_jax.data.quarantine import Quarantined
from phivision_jax.data.sources.item_options import ItemOptions
from phivision_jax.data.sources.items import ItemReader
from phivision_jax.data.sources.source import Read

FORMS = ("conversations", "messages", "question", "texts")


def messages_of(form: str, turns: int) -> list[dict[str, Any]]:
    role, content, user, assistant = {
        "conversations": ("from", "value", "human", "gpt"),
        "messages": ("role", "content", "user", "assistant"),
    }[form]
    pairs = [({role: user, content: "what?"}, {role: assistant, content: f"that {k}"}) for k in range(turns)]
    return [message for pair in pairs for message in pair]


def item_of(form: str) -> dict[str, Any]:
    if form == "question":
        return {"question": "what?", "answer": "that 0"}
    if form == "texts":
        return {"texts": [{"user": "what?", "assistant": "that 0"}]}
    return {form: messages_of(form, 1)}


def read(item: Any, **options: Any) -> Read | Quarantined:
    return ItemReader("made", Path("/nonexistent"), ItemOptions(**options)).read(item, "made:1", "made, item 1")
