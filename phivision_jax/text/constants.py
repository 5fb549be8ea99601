"""Values with a meaning of their own in token ids, labels and messages."""

from typing import Literal

IMAGE_TOKEN = -200
"""An image in token ids whose vision tokens are not laid out yet, as in the released code."""
IGNORE = -100
"""The label of a position without loss."""
PLACEHOLDER = 0
"""The token id at positions whose embedding is replaced by a vision token; any id would do."""

IMAGE_MARKER = "<image>"
"""An image in the text of a message."""
THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking", "thoughts", "thought")
"""Keys of a message, and types of a part of its content, under which other formats have an answer's thoughts."""
ROLES = ("system", "user", "assistant")
Mode = Literal["think", "nothink"]
"""The beginning of an answer: ``<think>`` thoughts ``</think>``, or the no-think token."""
PromptMode = Literal["auto", "think", "nothink"]
"""``Mode``, or "auto" to leave the choice to the model."""
