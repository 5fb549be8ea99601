"""Functions that ``shapes.yaml`` names; they run in lmms-eval's environment."""

from __future__ import annotations

from typing import Any


def doc_to_visual(doc: dict[str, Any]) -> list[Any]:
    return [image.convert("RGB") for image in doc["images"]]


def doc_to_text(doc: dict[str, Any]) -> str:
    return doc["question"]


def doc_to_messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
    """The question as a message, images in front."""
    parts: list[dict[str, Any]] = [{"type": "image", "url": image} for image in doc_to_visual(doc)]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": doc_to_text(doc)}]}]


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    return {"contains_answer": float(doc["answer"] in results[0].lower())}
