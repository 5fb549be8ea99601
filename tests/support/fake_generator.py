"""A generator without a model: it answers with words that a test chooses, at a speed that it chooses."""

from __future__ import annotations

import dataclasses
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from phivision_jax.images.sources import pixels
from phivision_jax.inference.local import LocalGenerator
from phivision_jax.inference.requests import Delta, Event, Reply, Request, Timings, TokenLogprob
from phivision_jax.text import chat

MAX_PROMPT = 10_000
"""Characters of a prompt."""


@dataclasses.dataclass
class FakeTicket:
    cancelled: threading.Event = dataclasses.field(default_factory=threading.Event)

    def cancel(self) -> None:
        self.cancelled.set()


@dataclasses.dataclass
class FakeGenerator(LocalGenerator):
    """Answers with given words.

    A word is a token, whose id is its number in the thought and answer. In mode "auto" it does not think.

    Attributes:
      waits: seconds before each word.
      fails: the engine ends with an error at the first word.
      submitted: every request.
    """

    slots: int = 2
    thought: str = "let me see "
    answer: str = "a red car "
    waits: float = 0.0
    fails: bool = False
    submitted: list[Request] = dataclasses.field(default_factory=list)
    images: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    active: int = 0
    cancelled: int = 0

    def __post_init__(self) -> None:
        self._lock, self._pool = threading.Lock(), ThreadPoolExecutor(self.slots)

    def submit(self, request: Request, on_event: Callable[[Event | Exception], None]) -> FakeTicket:
        messages, images = request.conversation()
        plain, inline = chat.flatten(messages)
        prompt = " ".join(message["content"] for message in plain)
        if len(prompt) > MAX_PROMPT:
            raise ValueError(f"the prompt has {len(prompt)} tokens, but a slot has {MAX_PROMPT}: shorten it")
        given = [image for image in [*images, *inline] if image is not None]
        self.images += [pixels(image, f"image {i}").size for i, image in enumerate(given)]
        self.submitted.append(request)
        ticket, begun = FakeTicket(), time.monotonic()

        def run(index: int) -> None:
            with self._lock:
                self.active += 1
            try:
                for event in self._sample(request, index, ticket, time.monotonic() - begun, len(prompt), len(given)):
                    on_event(event)
            finally:
                with self._lock:
                    self.active -= 1

        for index in range(request.n):
            self._pool.submit(run, index)
        return ticket

    def _sample(
        self, request: Request, index: int, ticket: FakeTicket, queued: float, prompt: int, images: int
    ) -> Iterator[Event | Exception]:
        thinks, limit = request.mode == "think", request.max_new_tokens or 10**9
        kinds = {"thought": self.thought if thinks else "", "answer": self.answer}
        words = [(kind, word) for kind, text in kinds.items() for word in re.findall(r"\S+\s*", text)]
        done: dict[str, list[str]] = {"thought": [], "answer": []}
        logprobs: list[TokenLogprob] = []
        for i, (kind, word) in enumerate(words[:limit]):
            if ticket.cancelled.wait(self.waits):
                break
            if self.fails:
                yield RuntimeError("the device is gone")
                return
            done[kind].append(word)
            top = tuple((i + j, -0.5 - j) for j in range(request.logprobs or 0))
            new = () if request.logprobs is None else (TokenLogprob(i, -0.5, top),)
            logprobs += new
            yield Delta(index, kind, word, new)  # type: ignore[arg-type]
        count = len(done["thought"]) + len(done["answer"])
        ended = ticket.cancelled.is_set() and count < len(words)
        self.cancelled += ended
        yield Reply(
            thought="".join(done["thought"]).strip(),
            answer="".join(done["answer"]).strip(),
            mode="think" if thinks else "nothink",
            finish_reason="cancelled" if ended else "length" if count < len(words) else "stop",
            ids=tuple(range(count)),
            prompt_tokens=prompt,
            image_tokens=100 * images,
            thought_tokens=len(done["thought"]),
            answer_tokens=len(done["answer"]),
            timings=Timings(queued, 0.0, 0.1),
            thought_closed=not ended,
            index=index,
            logprobs=tuple(logprobs),
        )

    def stats(self) -> dict[str, Any]:
        return {"slots": self.slots, "active": self.active, "cancelled": self.cancelled, "kind": "fake"}

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
