"""One sample of a request while it is answered: its place in the engine, and its reply as it grows."""

import time
from collections.abc import Callable

from phivision_jax.inference.prompts import Prompt
from phivision_jax.inference.requests import Delta, Event, FinishReason, Reply, Request, Timings, TokenLogprob
from phivision_jax.inference.transcript import Transcript


class Sample:
    """One sample of a request: its slot, and its reply as it grows.

    Args:
      limit: most new tokens.
      on_event: receives each ``Delta`` and then the ``Reply``.
      deltas: False gives the ``Reply`` alone.
    """

    def __init__(
        self,
        request: Request,
        index: int,
        prompt: Prompt,
        limit: int,
        transcript: Transcript,
        on_event: Callable[[Event], None],
        *,
        deltas: bool = True,
    ) -> None:
        self.request, self.index, self.prompt, self.limit = request, index, prompt, limit
        self.transcript, self.on_event, self._deltas = transcript, on_event, deltas
        self.slot: int | None = None
        self.cached = 0
        """Tokens of the prompt that are in the slot, or will be after the rows that are planned."""
        self.cancelled = self.finished = False
        self.logprobs: list[TokenLogprob] = []
        self._given = 0
        self.submitted = time.monotonic()
        self.started = self.first = self.last = 0.0

    def receive(
        self, token: int, logprob: float, top: tuple[tuple[int, float], ...], stop_ids: tuple[int, ...]
    ) -> None:
        """Add a chosen token, and finish if it ends the answer."""
        self.last = time.monotonic()
        self.first = self.first or self.last
        stop = token in stop_ids
        if not stop:
            self.transcript.add(token)
            if self.request.logprobs is not None:
                self.logprobs.append(TokenLogprob(token, logprob, top[: self.request.logprobs]))
        count = len(self.transcript.ids) + stop
        if stop or self.transcript.stopped:
            self.finish("stop")
        elif count >= self.limit:
            self.finish("length")
        elif self._deltas:
            self._give(final=False)

    def _give(self, *, final: bool) -> None:
        pieces = self.transcript.new_text(final=final)
        for i, (kind, text) in enumerate(pieces if self._deltas else ()):
            new = tuple(self.logprobs[self._given :]) if i == len(pieces) - 1 else ()
            self._given += len(new)
            self.on_event(Delta(self.index, kind, text, new))

    def finish(self, reason: FinishReason) -> None:
        """Give out the rest of the text, and the reply."""
        self.finished = True
        self._give(final=True)
        now, transcript, prompt = time.monotonic(), self.transcript, self.prompt
        started, first = self.started or now, self.first or now
        last = self.last or now
        timings = Timings(started - self.submitted, first - started, max(last - first, 0.0))
        thought = transcript.thought_tokens
        self.on_event(
            Reply(
                thought=transcript.thought.text,
                answer=transcript.answer.text,
                mode=transcript.mode,
                finish_reason=reason,
                ids=tuple(transcript.ids),
                prompt_tokens=len(prompt),
                image_tokens=prompt.image_tokens,
                thought_tokens=thought,
                answer_tokens=len(transcript.ids) - thought,
                timings=timings,
                thought_closed=not transcript.in_thought,
                index=self.index,
                logprobs=tuple(self.logprobs),
            )
        )
